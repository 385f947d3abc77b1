"""QK-norm, rotary embedding and KV write: one pass over the projection's output."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.case import Case, Check, Operation, Timed
from bench.gpu.paged import Heads
from kernels.gpu.rotate_and_write import rotate_and_write_triton
from kernels.rotate_and_write import rotate_and_write_torch

EPS = 1e-6
HEADS, BLOCK_SIZE, TOKENS = Heads(32, 8, 128), 64, 16384
Arguments = tuple[Tensor, Tensor | None, Tensor | None, float, Tensor, Tensor, Tensor, Tensor]


def arguments(
    heads: Heads, tokens: int, dtype: torch.dtype, device: torch.device, *, norm: bool
) -> Arguments:
    """Of ``rotate_and_write``: every token has a slot of its own, anywhere in a zeroed arena."""
    qkv = torch.randn((tokens, (heads.num + 2 * heads.num_kv) * heads.dim), device=device)
    weights = [torch.randn(heads.dim, device=device).to(dtype) for _ in range(2)]
    angles = torch.randn((tokens, heads.dim // 2), device=device)
    blocks = -(-tokens // BLOCK_SIZE)
    kv = torch.zeros((blocks, heads.num_kv, 2, BLOCK_SIZE, heads.dim), dtype=dtype, device=device)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=device)[:tokens]
    q_norm, k_norm = weights if norm else (None, None)
    return qkv.to(dtype), q_norm, k_norm, EPS, angles.cos(), angles.sin(), kv, slots


def check(heads: Heads, *, norm: bool) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = arguments(heads, 9, dtype, device, norm=norm)
        qkv, q_norm, k_norm, eps, cos, sin, kv, slots = given
        exact_kv = kv.float()
        exact = rotate_and_write_torch(
            qkv.float(), wide(q_norm), wide(k_norm), eps, cos, sin, exact_kv, slots
        )
        q = rotate_and_write_triton(*given)
        return torch.cat([q.flatten(), kv.flatten()]), torch.cat(
            [exact.flatten(), exact_kv.flatten()]
        )

    return Check(f"rotate and write, {heads}{', normalised' if norm else ''}", run)


def wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float()


def case(name: str, *, norm: bool) -> Case:
    def prepare() -> Timed:
        device = torch.device("cuda")
        given = arguments(HEADS, TOKENS, torch.bfloat16, device, norm=norm)

        def peers() -> dict[str, Operation]:
            compiled = torch.compile(rotate_and_write_torch)
            return {"torch.compile": lambda: compiled(*given)}

        return Timed(
            lambda: rotate_and_write_triton(*given),
            2 * given[0].numel() * given[0].element_size(),
            peers,
        )

    return Case(name, "copy", 0.90, prepare)


CHECKS = [check(Heads(4, 2, 64), norm=False), check(Heads(3, 1, 96), norm=True)]
CASES = [
    case("rotate and write", norm=False),
    case("normalise, rotate and write", norm=True),
]
