"""Writes new tokens' keys and values into the paged KV cache."""

from __future__ import annotations

from torch import Tensor

from kernels.backend import use_triton


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Store token t's key and value at ``slots[t]``; no two tokens may share a slot.

    ``k`` and ``v`` are [tokens, num_kv_heads, head_dim], their last dimension contiguous; ``kv``
    is a layer's view of the arena, [num_blocks, num_kv_heads, 2, block_size, head_dim], of the
    same type; ``slots`` is int64 [tokens], block * block_size + offset.
    """
    if use_triton(k):
        from kernels.gpu.write_kv import write_kv_triton

        write_kv_triton(k, v, kv, slots)
    else:
        write_kv_torch(k, v, kv, slots)


def write_kv_torch(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """``write_kv`` in torch."""
    block_size = kv.shape[3]
    where = (slots // block_size, slots % block_size)
    by_slot = kv.permute(2, 0, 3, 1, 4)  # [2, blocks, block_size, kv heads, head_dim]
    by_slot[0].index_put_(where, k)
    by_slot[1].index_put_(where, v)
