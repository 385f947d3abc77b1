"""Attention of one query per row over the row's blocks of the paged KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.decode_attention import decode_attention_native


def decode_attention(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """Softmax(scale * q K^T) V of each row, [rows, num_heads, head_dim], in ``q``'s type.

    ``q`` is [rows, num_heads, head_dim], its last dimension contiguous; ``kv`` is a layer's view
    of the arena, [num_blocks, num_kv_heads, 2, block_size, head_dim]. A row's query is the last
    of its tokens. ``window`` 0 means none; else a query at position p sees keys in
    (p - window, p]. ``scale`` is positive. A row of no tokens gives zeros. A row's result does not
    depend on the others, unless ``meta.balance_over`` cuts it by what they hold.
    """
    if use_triton(q):
        from kernels.gpu.decode_attention import decode_attention_triton

        return decode_attention_triton(q, kv, meta, scale=scale, window=window)
    native = library.load()
    if native is not None and q.shape[2] <= library.MAX_HEAD_DIM:
        return decode_attention_native(native, q, kv, meta, scale=scale, window=window)
    return decode_attention_torch(q, kv, meta, scale=scale, window=window)


def decode_attention_torch(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``decode_attention`` in torch, row by row."""
    _, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv.shape[1], kv.shape[3]
    by_head = kv.permute(2, 1, 0, 3, 4)  # [2, kv heads, blocks, block_size, head_dim]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, context in enumerate(meta.contexts):
        if context == 0:
            continue
        start = max(context - window, 0) if window else 0
        first, end = start // block_size, -(-context // block_size)
        skipped = first * block_size  # tokens ahead of the first gathered block
        gathered = by_head.index_select(2, meta.row_blocks(row)[first:end]).flatten(2, 3)
        k, v = gathered[:, :, start - skipped : context - skipped].unsqueeze(1)
        # The query heads that share a KV head are that head's queries: no mask, no repeat.
        queries = q[row].view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(queries, k, v, scale=scale)
        out[row] = attended.view(num_heads, head_dim)
    return out
