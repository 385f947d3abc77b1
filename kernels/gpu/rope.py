"""Rotary embedding: one program per token turns all its query and key heads."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import INTERPRETING, Pointer, Scalar, kernel, narrow


@kernel()
def turn(
    x: Pointer,
    out: Pointer,
    cos: Pointer,
    sin: Pointer,
    head_stride: Scalar,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Turn the heads of one token; all pointers are at that token."""
    heads = tl.arange(0, HEADS_PADDED)[:, None]
    columns = tl.arange(0, HALF_PADDED)[None, :]
    inside = (heads < HEADS) & (columns < HALF)
    c = tl.load(cos + columns, mask=columns < HALF, other=0.0)
    s = tl.load(sin + columns, mask=columns < HALF, other=0.0)
    source = x + heads * head_stride + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out + heads * (2 * HALF) + columns
    to: tl.constexpr = out.dtype.element_ty
    tl.store(target, narrow(first * c - second * s, to, UPCAST), mask=inside)
    tl.store(target + HALF, narrow(second * c + first * s, to, UPCAST), mask=inside)


@kernel()
def rope_kernel(
    q: Pointer,  # [tokens, Q_HEADS, 2 * HALF], last dimension contiguous
    k: Pointer,  # [tokens, K_HEADS, 2 * HALF], last dimension contiguous
    cos: Pointer,  # [tokens, HALF]
    sin: Pointer,
    q_out: Pointer,  # contiguous
    k_out: Pointer,
    q_stride: Scalar,
    q_head_stride: Scalar,
    k_stride: Scalar,
    k_head_stride: Scalar,
    Q_HEADS: tl.constexpr,
    Q_PADDED: tl.constexpr,
    K_HEADS: tl.constexpr,
    K_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    cos += token * HALF
    sin += token * HALF
    q_out += token * (Q_HEADS * 2 * HALF)
    k_out += token * (K_HEADS * 2 * HALF)
    q += token * q_stride
    k += token * k_stride
    turn(q, q_out, cos, sin, q_head_stride, Q_HEADS, Q_PADDED, HALF, HALF_PADDED, UPCAST)
    turn(k, k_out, cos, sin, k_head_stride, K_HEADS, K_PADDED, HALF, HALF_PADDED, UPCAST)


def apply_rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``kernels.rope.apply_rope`` on a GPU."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    half = q.shape[2] // 2
    if len(q):
        rope_kernel[(len(q),)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            Q_HEADS=q.shape[1],
            Q_PADDED=triton.next_power_of_2(q.shape[1]),
            K_HEADS=k.shape[1],
            K_PADDED=triton.next_power_of_2(k.shape[1]),
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            UPCAST=INTERPRETING,
        )
    return q_out, k_out
