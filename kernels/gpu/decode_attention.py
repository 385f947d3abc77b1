"""Decode attention: split KV, a work list of fixed chunks, then a combination of the parts.

An item is CHUNK tokens of one row; a program computes it for one KV head and the query heads that
share it, packed into one tile. Chunks start at multiples of CHUNK whatever the batch, so a row's
sums, and with them its result, do not depend on the other rows.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.gpu.language import INTERPRETING, Pointer, Scalar, kernel, narrow, widen

CHUNK = 512  # tokens of an item
TILE = 64  # tokens of one iteration
LOG2_E = 1.4426950408889634


@kernel(do_not_specialize=["table_stride"])
def decode_attention_kernel(
    q: Pointer,  # [rows, kv heads * GROUP, HEAD_DIM], last dimension contiguous
    kv: Pointer,  # [blocks, kv heads, 2, BLOCK_SIZE, HEAD_DIM], last two contiguous
    block_tables: Pointer,  # int32 [rows, table_stride]
    contexts: Pointer,  # int32 [rows]
    item_rows: Pointer,  # int32 [items]
    item_starts: Pointer,  # int32 [items]: first token of the chunk
    out: Pointer,  # SINGLE: [rows, kv heads * GROUP, HEAD_DIM]; else float32 [items, ...] sums
    peaks: Pointer,  # float32 [items, kv heads * GROUP]: largest score, in powers of 2
    totals: Pointer,  # float32 [items, kv heads * GROUP]: sum of exponentials
    q_stride: Scalar,
    q_head_stride: Scalar,
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,
    table_stride: Scalar,
    scale: Scalar,  # of q K^T, times log2 e
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,  # every row is one item
    UPCAST: tl.constexpr,
) -> None:
    item, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(item_rows + item).to(tl.int64)
    context = tl.load(contexts + row)
    chunk_start = tl.load(item_starts + item)
    end = tl.minimum(chunk_start + CHUNK, context)
    lowest = 0  # first key the query sees
    if WINDOW > 0:
        lowest = tl.maximum(context - WINDOW, 0)
    start = tl.maximum(chunk_start, lowest // TILE * TILE)

    heads = head * GROUP + tl.arange(0, GROUP_PADDED)
    columns = tl.arange(0, DIM_PADDED)
    inside = (tl.arange(0, GROUP_PADDED) < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    queries = q + row * q_stride + heads[:, None] * q_head_stride + columns[None, :]
    query = widen(tl.load(queries, mask=inside, other=0.0), UPCAST)

    peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    sums = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    table = block_tables + row * table_stride
    for first in range(start, end, TILE):
        tokens = first + tl.arange(0, TILE)
        seen = (tokens >= lowest) & (tokens < end)
        block = tl.load(table + tokens // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        offsets = block * kv_block_stride + tokens % BLOCK_SIZE * HEAD_DIM
        tile = kv + head.to(tl.int64) * kv_head_stride + offsets[:, None] + columns[None, :]
        loaded = seen[:, None] & (columns < HEAD_DIM)[None, :]
        keys = widen(tl.load(tile, mask=loaded, other=0.0), UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])  # every tile has a key that is seen
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        # Memory beyond the context is arbitrary, and 0 * NaN is NaN: masked, not weighted by 0.
        values = widen(tl.load(tile + kv_part_stride, mask=loaded, other=0.0), UPCAST)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        peak = new_peak

    num_heads = tl.num_programs(1) * GROUP
    if SINGLE:
        result = narrow(sums / total[:, None], out.dtype.element_ty, UPCAST)
        target = out + (row * num_heads + heads[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(target, result, mask=inside)
    else:
        places = item.to(tl.int64) * num_heads + heads
        in_group = tl.arange(0, GROUP_PADDED) < GROUP
        tl.store(peaks + places, peak, mask=in_group)
        tl.store(totals + places, total, mask=in_group)
        tl.store(out + places[:, None] * HEAD_DIM + columns[None, :], sums, mask=inside)


@kernel()
def combine_kernel(
    sums: Pointer,  # float32 [items, heads, HEAD_DIM]
    peaks: Pointer,  # float32 [items, heads]
    totals: Pointer,  # float32 [items, heads]
    row_starts: Pointer,  # int32 [rows + 1]: row i's items are [starts[i], starts[i + 1])
    out: Pointer,  # [rows, heads, HEAD_DIM]
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    columns = tl.arange(0, DIM_PADDED)
    inside = columns < HEAD_DIM
    peak = float("-inf")
    total = 0.0
    result = tl.zeros([DIM_PADDED], tl.float32)
    first_item = tl.load(row_starts + row).to(tl.int64)
    num_items = tl.load(row_starts + row + 1) - first_item
    for index in range(num_items):
        place = (first_item + index) * num_heads + head
        part_peak = tl.load(peaks + place)
        new_peak = tl.maximum(peak, part_peak)
        shrink, part_shrink = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
        part = tl.load(sums + place * HEAD_DIM + columns, mask=inside, other=0.0)
        result = result * shrink + part * part_shrink
        total = total * shrink + tl.load(totals + place) * part_shrink
        peak = new_peak
    result = result / tl.where(total > 0.0, total, 1.0)  # a row without tokens has no items
    target = out + (row * num_heads + head) * HEAD_DIM + columns
    tl.store(target, narrow(result, out.dtype.element_ty, UPCAST), mask=inside)


def decode_attention_triton(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``kernels.decode_attention.decode_attention`` on a GPU."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[1]
    group = num_heads // num_kv_heads
    padded = triton.next_power_of_2(head_dim)
    items = meta.decode_items(CHUNK, window)
    out = torch.empty((rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    parts, peaks, totals = out, out, out  # what SINGLE does not use
    if not items.single:
        shape = (len(items.rows), num_heads)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        peaks = torch.empty(shape, dtype=torch.float32, device=q.device)
        totals = torch.empty_like(peaks)
    if len(items.rows):
        decode_attention_kernel[(len(items.rows), num_kv_heads)](
            q,
            kv,
            meta.block_tables,
            meta.context_lens,
            items.rows,
            items.starts,
            parts,
            peaks,
            totals,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            meta.block_tables.shape[1],
            scale * LOG2_E,
            WINDOW=window,
            GROUP=group,
            GROUP_PADDED=max(triton.next_power_of_2(group), 16),
            HEAD_DIM=head_dim,
            DIM_PADDED=padded,
            BLOCK_SIZE=kv.shape[3],
            CHUNK=CHUNK,
            TILE=TILE,
            SINGLE=items.single,
            UPCAST=INTERPRETING,
            num_warps=4,
            num_stages=3,
        )
    if not items.single and rows:
        combine_kernel[(rows, num_heads)](
            parts,
            peaks,
            totals,
            items.row_starts,
            out,
            HEAD_DIM=head_dim,
            DIM_PADDED=padded,
            UPCAST=INTERPRETING,
        )
    return out
