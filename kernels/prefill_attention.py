"""Causal attention of ragged rows of queries over the rows' blocks of the paged KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.prefill_attention import prefill_attention_native


def prefill_attention(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """Softmax(scale * q K^T) V of each query, [tokens, num_heads, head_dim], in ``q``'s type.

    ``q`` is [tokens, num_heads, head_dim], its last dimension contiguous, all rows' queries one
    after the other; ``kv`` is a layer's view of the arena,
    [num_blocks, num_kv_heads, 2, block_size, head_dim], in which the queries' own keys are
    already written. A query at position p sees keys up to p; with a ``window`` other than 0, only
    those in (p - window, p]. ``scale`` is positive.
    """
    if use_triton(q):
        from kernels.gpu.prefill_attention import prefill_attention_triton

        return prefill_attention_triton(q, kv, meta, scale=scale, window=window)
    native = library.load_for_products()
    if native is not None and q.dtype == torch.bfloat16 and q.shape[2] <= library.MAX_HEAD_DIM:
        return prefill_attention_native(native, q, kv, meta, scale=scale, window=window)
    return prefill_attention_torch(q, kv, meta, scale=scale, window=window)


def prefill_attention_torch(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``prefill_attention`` in torch, tile by tile."""
    block_size = kv.shape[3]
    by_head = kv.permute(2, 1, 0, 3, 4)  # [2, kv heads, blocks, block_size, head_dim]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.split(q, list(meta.query_lens))
    out_rows = torch.split(out, list(meta.query_lens))
    for tile in meta.query_tiles(block_size, window):
        end_block = tile.first_block - (-tile.end_key // block_size)
        blocks = meta.row_blocks(tile.row)[tile.first_block : end_block]
        gathered = by_head.index_select(2, blocks).flatten(2, 3)
        k, v = gathered[:, :, tile.first_key : tile.end_key].unsqueeze(1)
        attended = F.scaled_dot_product_attention(
            rows[tile.row][tile.start : tile.end].transpose(0, 1).unsqueeze(0),
            k,  # [1, kv heads, keys, head_dim]
            v,
            attn_mask=tile.visible,
            scale=scale,
            enable_gqa=True,
        )
        out_rows[tile.row][tile.start : tile.end] = attended[0].transpose(0, 1)
    return out
