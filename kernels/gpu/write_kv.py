"""KV write: one program per token stores the keys and values of all its heads."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import Pointer, Scalar, kernel


@kernel()
def write_kv_kernel(
    k: Pointer,  # [tokens, HEADS, HEAD_DIM], last dimension contiguous
    v: Pointer,
    kv: Pointer,  # [blocks, HEADS, 2, BLOCK_SIZE, HEAD_DIM], last two dimensions contiguous
    slots: Pointer,  # int64 [tokens]
    k_stride: Scalar,
    k_head_stride: Scalar,
    v_stride: Scalar,
    v_head_stride: Scalar,
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,  # from a K tile to its V tile
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads = tl.arange(0, HEADS_PADDED)[:, None].to(tl.int64)
    columns = tl.arange(0, DIM_PADDED)[None, :]
    inside = (heads < HEADS) & (columns < HEAD_DIM)
    target = kv + slot // BLOCK_SIZE * kv_block_stride + slot % BLOCK_SIZE * HEAD_DIM
    target += heads * kv_head_stride + columns
    keys = tl.load(k + token * k_stride + heads * k_head_stride + columns, mask=inside)
    tl.store(target, keys, mask=inside)
    values = tl.load(v + token * v_stride + heads * v_head_stride + columns, mask=inside)
    tl.store(target + kv_part_stride, values, mask=inside)


def write_kv_triton(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """``kernels.write_kv.write_kv`` on a GPU."""
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    write_kv_kernel[(tokens,)](
        k,
        v,
        kv,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv.shape[3],
    )
