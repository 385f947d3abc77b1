"""Prefill attention: one program per query tile and KV head, keys through the block table.

A tile packs BLOCK_M // GROUP tokens times the GROUP query heads that share the KV head. Keys that
all its queries see run without a mask; the rest, the diagonal and a window, with one.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.gpu.language import INTERPRETING, Pointer, Scalar, Tile, kernel, narrow, widen

BLOCK_M = 128  # query tokens times query heads of a program
BLOCK_N = 64  # keys of one iteration
LOG2_E = 1.4426950408889634


@kernel()
def attend(
    query: Tile,  # [M, DIM_PADDED]
    positions: Tile,  # [M]
    sums: Tile,  # float32 [M, DIM_PADDED]
    peak: Tile,  # float32 [M]
    total: Tile,  # float32 [M]
    kv: Pointer,  # at the KV head
    table: Pointer,  # at the row
    start: Scalar,
    end: Scalar,
    context: Scalar,
    kv_block_stride: Scalar,
    kv_part_stride: Scalar,
    scale: Scalar,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:
    """Add keys [start, end) to the running softmax; without MASKED, every query sees them all."""
    columns = tl.arange(0, DIM_PADDED)
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        written = tokens < context
        block = tl.load(table + tokens // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        offsets = block * kv_block_stride + tokens % BLOCK_SIZE * HEAD_DIM
        tile = kv + offsets[:, None] + columns[None, :]
        loaded = written[:, None] & (columns < HEAD_DIM)[None, :]
        keys = widen(tl.load(tile, mask=loaded, other=0.0), UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen &= tokens[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = new_peak
        if MASKED:  # a window may hide all keys so far from a query
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        values = widen(tl.load(tile + kv_part_stride, mask=loaded, other=0.0), UPCAST)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        peak = new_peak
    return sums, peak, total


@kernel(do_not_specialize=["table_stride"])
def prefill_attention_kernel(
    q: Pointer,  # [tokens, kv heads * GROUP, HEAD_DIM], last dimension contiguous
    kv: Pointer,  # [blocks, kv heads, 2, BLOCK_SIZE, HEAD_DIM], last two contiguous
    block_tables: Pointer,  # int32 [rows, table_stride]
    query_starts: Pointer,  # int32 [rows + 1]
    contexts: Pointer,  # int32 [rows]
    tile_rows: Pointer,  # int32 [tiles]
    tile_starts: Pointer,  # int32 [tiles]: first query, counted from the row's first
    out: Pointer,  # [tokens, kv heads * GROUP, HEAD_DIM]
    q_stride: Scalar,
    q_head_stride: Scalar,
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,
    table_stride: Scalar,
    scale: Scalar,  # of q K^T, times log2 e
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows + tile).to(tl.int64)
    tile_start = tl.load(tile_starts + tile)
    row_start = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - row_start
    context = tl.load(contexts + row)
    before = context - queries  # tokens ahead of the row's first query

    places = tl.arange(0, BLOCK_M)
    token = tile_start + places // GROUP
    columns = tl.arange(0, DIM_PADDED)
    used = (places < BLOCK_M // GROUP * GROUP) & (token < queries)
    inside = used[:, None] & (columns < HEAD_DIM)[None, :]
    num_heads = tl.num_programs(1) * GROUP
    heads = head * GROUP + places % GROUP
    global_token = (row_start + token).to(tl.int64)
    source = q + (global_token * q_stride + heads * q_head_stride)[:, None] + columns[None, :]
    query = widen(tl.load(source, mask=inside, other=0.0), UPCAST)

    last = tl.minimum(tile_start + BLOCK_M // GROUP, queries) - 1  # the tile's last query
    positions = before + tl.minimum(token, last)  # unused places see what the last query sees
    end = before + last + 1
    start = 0
    full_end = (before + tile_start + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        start = tl.maximum(before + tile_start + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        full_end = start

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    kv += head.to(tl.int64) * kv_head_stride
    table = block_tables + row * table_stride
    if WINDOW == 0:
        sums, peak, total = attend(
            query, positions, sums, peak, total, kv, table, start, full_end, context,
            kv_block_stride, kv_part_stride, scale, WINDOW, False,
            HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, UPCAST,
        )  # fmt: skip
    sums, peak, total = attend(
        query, positions, sums, peak, total, kv, table, full_end, end, context,
        kv_block_stride, kv_part_stride, scale, WINDOW, True,
        HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, UPCAST,
    )  # fmt: skip
    result = narrow(sums / total[:, None], out.dtype.element_ty, UPCAST)
    target = out + ((global_token * num_heads + heads) * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(target, result, mask=inside)


def prefill_attention_triton(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``kernels.prefill_attention.prefill_attention`` on a GPU."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    tile_rows, tile_starts = meta.prefill_tiles(BLOCK_M // group)
    if len(tile_rows):
        prefill_attention_kernel[(len(tile_rows), num_kv_heads)](
            q,
            kv,
            meta.block_tables,
            meta.query_starts,
            meta.context_lens,
            tile_rows,
            tile_starts,
            out,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            meta.block_tables.shape[1],
            scale * LOG2_E,
            WINDOW=window,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM_PADDED=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=kv.shape[3],
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            UPCAST=INTERPRETING,
            num_warps=8,
            num_stages=2,
        )
    return out
