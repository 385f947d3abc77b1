"""RMSNorm with an optional residual addition: one program per row, float32 inside."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import INTERPRETING, Pointer, Scalar, kernel, narrow


@kernel()
def rms_norm_kernel(
    x: Pointer,  # [tokens, N], last dimension contiguous
    residual: Pointer,  # the same
    weight: Pointer,  # [N]
    total: Pointer,  # [tokens, N]: x + residual
    out: Pointer,  # [tokens, N]
    x_stride: Scalar,
    residual_stride: Scalar,
    eps: Scalar,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    ADD: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < N
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        rounded = narrow(values + added.to(tl.float32), x.dtype.element_ty, UPCAST)
        tl.store(total + row * N + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    normed = narrow(values * scale, x.dtype.element_ty, UPCAST).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = narrow(normed * weights, out.dtype.element_ty, UPCAST)
    tl.store(out + row * N + columns, result, mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``kernels.rms_norm.rms_norm`` on a GPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, x, out, eps, add=False)
    return out


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``kernels.rms_norm.add_rms_norm`` on a GPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(x, residual, weight, total, out, eps, add=True)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    tokens, n = x.shape
    if tokens == 0:
        return
    padded = triton.next_power_of_2(n)
    rms_norm_kernel[(tokens,)](
        x,
        residual,
        weight,
        total,
        out,
        x.stride(0),
        residual.stride(0),
        eps,
        N=n,
        PADDED=padded,
        ADD=add,
        UPCAST=INTERPRETING,
        num_warps=min(max(padded // 512, 1), 16),
    )
