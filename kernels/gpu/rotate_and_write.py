"""QK-norm, rotary embedding and KV write: a program takes some heads of one token.

The first programs of a token take its query heads, the others a key head each with the value head
of the same number. Heads are held as two halves, which are loaded in whole vectors.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import INTERPRETING, Pointer, Scalar, Tile, kernel, narrow

ELEMENTS = 1024  # of the queries, or of the keys, of a program


@kernel()
def rotate(
    source: Pointer,  # [.., 2 * HALF], at the program's first head
    target: Tile,  # pointers [HEADS, HALF_PADDED] to the first halves
    norm: Pointer,  # [2 * HALF]
    eps: Scalar,
    cos: Pointer,  # [HALF], of the token
    sin: Pointer,
    remaining: Scalar,  # heads from the first on
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Normalise, if NORM, and turn HEADS heads, fewer if fewer remain."""
    to: tl.constexpr = source.dtype.element_ty
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF_PADDED)[None, :]
    in_half = columns < HALF
    inside = (heads < remaining) & in_half
    source += heads * (2 * HALF) + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        weight = tl.load(norm + columns, mask=in_half, other=0.0).to(tl.float32)
        first = narrow(first * scale, to, UPCAST).to(tl.float32)
        first = narrow(first * weight, to, UPCAST).to(tl.float32)
        weight = tl.load(norm + HALF + columns, mask=in_half, other=0.0).to(tl.float32)
        second = narrow(second * scale, to, UPCAST).to(tl.float32)
        second = narrow(second * weight, to, UPCAST).to(tl.float32)
    c = tl.load(cos + columns, mask=in_half, other=0.0)
    s = tl.load(sin + columns, mask=in_half, other=0.0)
    tl.store(target, narrow(first * c - second * s, to, UPCAST), mask=inside)
    tl.store(target + HALF, narrow(second * c + first * s, to, UPCAST), mask=inside)


@kernel()
def rotate_and_write_kernel(
    qkv: Pointer,  # [tokens, Q_HEADS + 2 * K_HEADS, 2 * HALF]
    q_norm: Pointer,  # [2 * HALF], or nothing when not NORM
    k_norm: Pointer,
    cos: Pointer,  # [tokens, HALF]
    sin: Pointer,
    slots: Pointer,  # int64 [tokens]
    q: Pointer,  # [tokens, Q_HEADS, 2 * HALF]
    kv: Pointer,  # [blocks, K_HEADS, 2, BLOCK_SIZE, 2 * HALF], last two dimensions contiguous
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,  # from a K tile to its V tile
    eps: Scalar,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # of a program, a power of 2
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    head_dim: tl.constexpr = 2 * HALF
    query_programs: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF_PADDED)[None, :]
    qkv += token * ((Q_HEADS + 2 * K_HEADS) * head_dim)
    cos += token * HALF
    sin += token * HALF
    if part < query_programs:
        first = part * HEADS
        source = qkv + first * head_dim
        target = q + (token * Q_HEADS + first) * head_dim + heads * head_dim + columns
        left = Q_HEADS - first
        rotate(source, target, q_norm, eps, cos, sin, left, HEADS, HALF, HALF_PADDED, NORM, UPCAST)
    else:
        first = (part - query_programs) * HEADS
        source = qkv + (Q_HEADS + first) * head_dim
        slot = tl.load(slots + token)
        kv += slot // BLOCK_SIZE * kv_block_stride + slot % BLOCK_SIZE * head_dim
        target = kv + (first + heads).to(tl.int64) * kv_head_stride + columns
        left = K_HEADS - first
        rotate(source, target, k_norm, eps, cos, sin, left, HEADS, HALF, HALF_PADDED, NORM, UPCAST)
        values = source + K_HEADS * head_dim + heads * head_dim + columns
        target += kv_part_stride
        inside = (heads < left) & (columns < HALF)
        tl.store(target, tl.load(values, mask=inside), mask=inside)
        tl.store(target + HALF, tl.load(values + HALF, mask=inside), mask=inside)


def rotate_and_write_triton(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """``kernels.rotate_and_write.rotate_and_write`` on a GPU."""
    tokens, kv_heads, head_dim = len(qkv), kv.shape[1], kv.shape[4]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    norm = q_norm is not None and k_norm is not None
    constants = rotation_constants(heads, kv, norm=norm)
    in_program = constants["HEADS"]
    grid = (tokens, triton.cdiv(heads, in_program) + triton.cdiv(kv_heads, in_program))
    rotate_and_write_kernel[grid](
        qkv,
        q_norm if norm else qkv,
        k_norm if norm else qkv,
        cos,
        sin,
        slots,
        q,
        kv,
        *kv.stride()[:3],
        eps,
        **constants,
    )
    return q


def rotation_constants(heads: int, kv: Tensor, *, norm: bool) -> dict[str, Any]:
    """What the kernel is compiled for: ``heads`` query heads on ``kv``, a layer's view."""
    _, kv_heads, _, block_size, head_dim = kv.shape
    half_padded = triton.next_power_of_2(head_dim // 2)
    return {
        "Q_HEADS": heads,
        "K_HEADS": kv_heads,
        "HEADS": min(triton.next_power_of_2(heads), max(1, ELEMENTS // (2 * half_padded))),
        "HALF": head_dim // 2,
        "HALF_PADDED": half_padded,
        "BLOCK_SIZE": block_size,
        "NORM": norm,
        "UPCAST": INTERPRETING,
        "num_warps": 2,
    }
