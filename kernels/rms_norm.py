"""Root mean square normalisation (Zhang and Sennrich 2019), alone or after a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.elementwise import add_rms_norm_native, rms_norm_native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` over its root mean square along the last dimension, times ``weight``.

    ``x`` is [tokens, n], its last dimension contiguous; ``weight`` is [n]. In float32, rounded to
    ``x``'s type before the weight is applied, as Llama does. A new tensor.
    """
    if use_triton(x):
        from kernels.gpu.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    native = library.load()
    if native is not None:
        return rms_norm_native(native, x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, the sum rounded to ``x``'s type; new tensors.

    ``x`` and ``residual`` are [tokens, n], their last dimension contiguous.
    """
    if use_triton(x):
        from kernels.gpu.rms_norm import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    native = library.load()
    if native is not None:
        return add_rms_norm_native(native, x, residual, weight, eps)
    return add_rms_norm_torch(x, residual, weight, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in torch."""
    total = x + residual
    return rms_norm_torch(total, weight, eps), total
