"""Norms, gate and rotary embedding in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES, pointer


def rms_norm_native(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``kernels.rms_norm.rms_norm``."""
    out = torch.empty(x.shape, dtype=x.dtype)
    library.rms_norm(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), *x.shape
    )
    return out


def add_rms_norm_native(
    library: ctypes.CDLL, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``kernels.rms_norm.add_rms_norm``."""
    out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    library.add_rms_norm(
        DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        total.data_ptr(),
        *x.shape,
    )
    return out, total


def silu_mul_native(library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    """``kernels.silu_mul.silu_mul``."""
    rows, width = gate_up.shape
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
    library.silu_mul(DTYPES[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
    return out


def rotate_and_write_native(
    library: ctypes.CDLL,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """``kernels.rotate_and_write.rotate_and_write``."""
    _, kv_heads, _, block_size, head_dim = kv.shape
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    queries = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype)
    library.rotate_and_write(
        DTYPES[qkv.dtype],
        qkv.data_ptr(),
        pointer(q_norm),
        pointer(k_norm),
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        kv.data_ptr(),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        block_size,
        queries.data_ptr(),
        tokens,
        heads,
        kv_heads,
        head_dim,
    )
    return queries
