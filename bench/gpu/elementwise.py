"""Norms and the gate: each reads and writes its tensors once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu.case import Case, Check, Timed
from kernels.gpu.rms_norm import add_rms_norm_triton, rms_norm_triton
from kernels.gpu.silu_mul import silu_mul_triton
from kernels.rms_norm import add_rms_norm_torch, rms_norm_torch
from kernels.silu_mul import silu_mul_torch

EPS = 1e-6
Operation = Callable[..., Tensor | tuple[Tensor, Tensor]]


def check(name: str, ours: Operation, twin: Operation, shapes: Sequence[tuple[int, ...]]) -> Check:
    """``shapes`` are those of the operation's tensors."""

    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
        return joined(ours(*tensors)), joined(twin(*(tensor.float() for tensor in tensors)))

    return Check(name, run)


def joined(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(result) if isinstance(result, tuple) else result


def case(
    name: str,
    ours: Operation,
    twin: Operation,
    shapes: Sequence[tuple[int, ...]],
    outputs: int,  # elements
) -> Case:
    def prepare() -> Timed:
        tensors = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]

        def peers() -> dict[str, Callable[[], object]]:
            compiled = torch.compile(twin)
            return {"torch.compile": lambda: compiled(*tensors), "torch": lambda: twin(*tensors)}

        return Timed(
            lambda: ours(*tensors),
            2 * (sum(tensor.numel() for tensor in tensors) + outputs),
            peers,
        )

    return Case(name, "copy", 0.90, prepare)


def rms_norm_ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_triton(x, weight, EPS)


def rms_norm_twin(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_torch(x, weight, EPS)


def add_rms_norm_ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm_triton(x, residual, weight, EPS)


def add_rms_norm_twin(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm_torch(x, residual, weight, EPS)


TOKENS, HIDDEN, INNER = 16384, 4096, 14336
CHECKS = [
    check("RMSNorm", rms_norm_ours, rms_norm_twin, [(5, 200), (200,)]),
    check("residual and RMSNorm", add_rms_norm_ours, add_rms_norm_twin, [(5, 96)] * 2 + [(96,)]),
    check("SiLU gate", silu_mul_triton, silu_mul_torch, [(3, 300)]),
]
CASES = [
    case("RMSNorm", rms_norm_ours, rms_norm_twin, [(TOKENS, HIDDEN), (HIDDEN,)], TOKENS * HIDDEN),
    case(
        "residual and RMSNorm",
        add_rms_norm_ours,
        add_rms_norm_twin,
        [(TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,)],
        2 * TOKENS * HIDDEN,
    ),
    case("SiLU gate", silu_mul_triton, silu_mul_torch, [(TOKENS, 2 * INNER)], TOKENS * INNER),
]
