"""Prefill attention: one program per query tile and KV head, keys through the block table.

A tile packs BLOCK_M // GROUP tokens times the GROUP query heads that share the KV head. Key tiles
that all its queries see whole run without a mask; those at the diagonal, and at a window's lower
edge, with one. The order of a query's sums depends on its tile's place in the row alone.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.gpu.language import (
    INTERPRETING,
    LOG2_E,
    Pointer,
    Scalar,
    Tile,
    kernel,
    narrow,
    padded_head_dim,
    widen,
)
from kernels.gpu.paged import block_ids, key_tile


@dataclass(frozen=True, slots=True)
class Tiling:
    queries: int  # BLOCK_M: query tokens times query heads of a program
    keys: int  # BLOCK_N: of one iteration
    num_warps: int = 8
    num_stages: int = 3


# By padded head_dim; what compiles without spilled registers. Eight warps per program, or the key
# tiles that every program reads would ask more of the L2 cache than it gives.
TILINGS = {
    16: Tiling(128, 64),
    32: Tiling(128, 64),
    64: Tiling(128, 64),
    128: Tiling(128, 64),
    256: Tiling(128, 32, num_stages=2),
}
FLOAT32_TILING = Tiling(32, 16, num_warps=4, num_stages=2)  # three products for each one


@kernel()
def attend(
    query: Tile,  # [M, DIM_PADDED]
    positions: Tile,  # [M]
    sums: Tile,  # float32 [M, DIM_PADDED]
    peak: Tile,  # float32 [M]: largest score, in powers of 2
    total: Tile,  # float32 [M]: sum of exponentials
    kv: Pointer,  # at the KV head
    table: Pointer,  # at the row
    start: Scalar,  # a multiple of BLOCK_N
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
    ids = block_ids(table, start, context, BLOCK_SIZE, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        tile = key_tile(kv, ids, first, kv_block_stride, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N)
        ids = block_ids(table, first + BLOCK_N, context, BLOCK_SIZE, BLOCK_N)
        tokens = first + tl.arange(0, BLOCK_N)
        loaded = (columns < HEAD_DIM)[None, :]
        if MASKED:
            loaded &= (tokens < context)[:, None]
        keys = widen(tl.load(tile, mask=loaded, other=0.0), UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen &= tokens[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        base = new_peak
        if MASKED:  # a window may hide all keys so far from a query
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        values = widen(tl.load(tile + kv_part_stride, mask=loaded, other=0.0), UPCAST)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
        peak = new_peak
    return sums, peak, total


@kernel(do_not_specialize=["table_stride"])
def prefill_attention_kernel(
    q: Pointer,  # [tokens, KV_HEADS * GROUP, HEAD_DIM], last dimension contiguous
    kv: Pointer,  # [blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM], last two contiguous
    block_tables: Pointer,  # int32 [rows, table_stride]
    query_starts: Pointer,  # int32 [rows + 1]
    contexts: Pointer,  # int32 [rows]
    tiles: Pointer,  # int32 [tiles, 2]: row, first query from the row's first
    out: Pointer,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    q_stride: Scalar,
    q_head_stride: Scalar,
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,  # from a K tile to its V tile
    table_stride: Scalar,
    scale: Scalar,  # of q K^T, times log2 e
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    tile, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    row = tl.load(tiles + tile * 2).to(tl.int64)
    tile_start = tl.load(tiles + tile * 2 + 1)
    row_start = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - row_start
    context = tl.load(contexts + row)
    before = context - queries  # tokens ahead of the row's first query

    places = tl.arange(0, BLOCK_M)
    token = tile_start + places // GROUP
    columns = tl.arange(0, DIM_PADDED)
    used = (places < BLOCK_M // GROUP * GROUP) & (token < queries)
    inside = used[:, None] & (columns < HEAD_DIM)[None, :]
    heads = head * GROUP + places % GROUP
    global_token = (row_start + token).to(tl.int64)
    source = q + (global_token * q_stride + heads * q_head_stride)[:, None] + columns[None, :]
    query = widen(tl.load(source, mask=inside, other=0.0), UPCAST)

    last = tl.minimum(tile_start + BLOCK_M // GROUP, queries) - 1  # the tile's last query
    positions = before + tl.minimum(token, last)  # unused places see what the last query sees
    end = before + last + 1
    full_start = 0  # of the key tiles that all queries see whole
    full_end = (before + tile_start + 1) // BLOCK_N * BLOCK_N

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    kv += head.to(tl.int64) * kv_head_stride
    table = block_tables + row * table_stride
    if WINDOW > 0:
        start = tl.maximum(before + tile_start + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        full_start = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
        full_end = tl.maximum(full_start, full_end)
        sums, peak, total = attend(
            query, positions, sums, peak, total, kv, table, start, tl.minimum(full_start, end),
            context, kv_block_stride, kv_part_stride, scale, WINDOW, True,
            HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, UPCAST,
        )  # fmt: skip
    sums, peak, total = attend(
        query, positions, sums, peak, total, kv, table, full_start, full_end,
        context, kv_block_stride, kv_part_stride, scale, WINDOW, False,
        HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, UPCAST,
    )  # fmt: skip
    sums, peak, total = attend(
        query, positions, sums, peak, total, kv, table, full_end, end,
        context, kv_block_stride, kv_part_stride, scale, WINDOW, True,
        HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, UPCAST,
    )  # fmt: skip
    result = narrow(sums / total[:, None], out.dtype.element_ty, UPCAST)
    num_heads = KV_HEADS * GROUP
    target = out + ((global_token * num_heads + heads) * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(target, result, mask=inside)


def prefill_constants(num_heads: int, kv: Tensor, window: int) -> dict[str, Any]:
    """What ``prefill_attention_kernel`` is compiled for, its launch options included.

    ``kv`` is [blocks, kv heads, 2, block_size, head_dim]. Raises ValueError for a head_dim above
    256.
    """
    _, num_kv_heads, _, block_size, head_dim = kv.shape
    padded = padded_head_dim(head_dim)
    tiling = TILINGS[padded] if kv.element_size() < 4 else FLOAT32_TILING
    return {
        "WINDOW": window,
        "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiling.queries,
        "BLOCK_N": tiling.keys,
        "UPCAST": INTERPRETING,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def prefill_attention_triton(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``kernels.prefill_attention.prefill_attention`` on a GPU."""
    constants = prefill_constants(q.shape[1], kv, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = meta.prefill_tiles(constants["BLOCK_M"] // constants["GROUP"])
    if len(tiles):
        prefill_attention_kernel[(len(tiles) * kv.shape[1],)](
            q,
            kv,
            meta.block_tables,
            meta.query_starts,
            meta.context_lens,
            tiles,
            out,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            meta.block_tables.shape[1],
            scale * LOG2_E,
            **constants,
        )
    return out
