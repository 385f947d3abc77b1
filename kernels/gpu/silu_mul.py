"""SwiGLU's gate: one program per token and run of columns."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import INTERPRETING, Pointer, kernel, narrow

COLUMNS = 1024  # of a program


@kernel()
def silu_mul_kernel(
    gate_up: Pointer,  # [tokens, 2 * N]
    out: Pointer,  # [tokens, N]
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    source = gate_up + row * (2 * N) + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + N, mask=inside, other=0.0).to(tl.float32)
    to: tl.constexpr = out.dtype.element_ty
    silu = narrow(gate / (1.0 + tl.exp(-gate)), to, UPCAST).to(tl.float32)
    tl.store(out + row * N + columns, narrow(silu * up, to, UPCAST), mask=inside)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """``kernels.silu_mul.silu_mul`` on a GPU."""
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, n), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        grid = (tokens, triton.cdiv(n, COLUMNS))
        silu_mul_kernel[grid](gate_up, out, N=n, COLUMNS=COLUMNS, UPCAST=INTERPRETING)
    return out
