"""Paged decode attention: bound by reading the KV cache."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.case import Case, Check, Operation, Timed
from bench.gpu.paged import Cache, Heads, random_cache, random_queries
from kernels.decode_attention import decode_attention_torch
from kernels.gpu.decode_attention import decode_attention_triton, decode_programs

GQA_4, GQA_8, NARROW = Heads(32, 8, 128), Heads(64, 8, 128), Heads(32, 8, 64)
RAGGED = [random.Random(0).randint(1, 16) ** 2 * 64 for _ in range(64)]  # 64 to 16 Ki tokens


def check(heads: Heads, block_size: int, window: int, balance_over: int = 0) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache = random_cache([1, 63, 64, 65, 300, 0, 520], heads, block_size, dtype, device)
        meta = cache.metadata([min(n, 1) for n in cache.contexts], balance_over=balance_over)
        q = random_queries(len(cache.contexts), heads, dtype, device)
        result = decode_attention_triton(q, cache.kv, meta, scale=heads.scale, window=window)
        expected = decode_attention_torch(
            q.float(), cache.kv.float(), meta, scale=heads.scale, window=window
        )
        return result, expected

    balanced = ", balanced" if balance_over else ""
    return Check(
        f"decode attention, {heads}, blocks of {block_size}, window {window}{balanced}", run
    )


def case(
    name: str,
    contexts: list[int],
    heads: Heads,
    goal: float | None,
    *,
    block_size: int = 64,
    balanced: bool = False,
) -> Case:
    def prepare() -> Timed:
        device = torch.device("cuda")
        cache = random_cache(contexts, heads, block_size, torch.bfloat16, device)
        programs = decode_programs(device, heads.dim) // heads.num_kv
        meta = cache.metadata([1] * len(contexts), balance_over=programs if balanced else 0)
        q = random_queries(len(contexts), heads, torch.bfloat16, device)
        kv_bytes = sum(contexts) * heads.num_kv * heads.dim * 2 * cache.kv.element_size()

        def peers() -> dict[str, Operation]:
            if len(set(contexts)) > 1:
                return {}
            k, v = gathered(cache)

            def sdpa() -> Tensor:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)

            return {"cuDNN, gathered": sdpa}

        return Timed(
            lambda: decode_attention_triton(q, cache.kv, meta, scale=heads.scale, window=0),
            kv_bytes,
            peers,
        )

    return Case(f"decode, {name}", "copy", goal, prepare)


def gathered(cache: Cache) -> Tensor:
    """Rows of one length as [2, rows, kv heads, tokens, head_dim], contiguous."""
    ids = torch.tensor(cache.tables, device=cache.kv.device)
    blocks = cache.kv[ids]  # [rows, blocks, kv heads, 2, block_size, head_dim]
    return blocks.permute(3, 0, 2, 1, 4, 5).flatten(3, 4)[..., : cache.contexts[0], :].contiguous()


CHECKS = [
    check(Heads(4, 1, 128), 64, 0),
    check(Heads(16, 1, 256), 16, 0),
    check(Heads(2, 2, 80), 16, 100),
    check(Heads(4, 2, 64), 128, 0, balance_over=5),
]
CASES = [
    case("64 x 8 Ki tokens", [8192] * 64, GQA_4, 0.85),
    case("64 x 8 Ki tokens, 8 queries a head", [8192] * 64, GQA_8, 0.85),
    case("64 x 8 Ki tokens, head_dim 64", [8192] * 64, NARROW, 0.85),
    case("64 x 8 Ki tokens, blocks of 16", [8192] * 64, GQA_4, 0.85, block_size=16),
    case("64 ragged rows", RAGGED, GQA_4, 0.80),
    case("64 ragged rows, balanced", RAGGED, GQA_4, 0.80, balanced=True),
    case("1 x 32 Ki tokens", [32768], GQA_4, 0.60),
    case("1 x 32 Ki tokens, balanced", [32768], GQA_4, 0.60, balanced=True),
]
