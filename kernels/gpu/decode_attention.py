"""Decode attention: split KV over a list of items, then a combination of rows in several parts.

An item is a run of one row's keys; a program computes it for one KV head and the query heads that
share it, packed into one tile. As many programs as fit on the GPU take the items in turn, so the
launch has one shape whatever the batch. An item that is its row's only one writes the result.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.decode_items import TILE
from kernels.gpu.language import (
    INTERPRETING,
    LOG2_E,
    MAX_HEAD_DIM,
    Pointer,
    Scalar,
    kernel,
    narrow,
    num_multiprocessors,
    padded_head_dim,
    widen,
)
from kernels.gpu.paged import block_ids, key_tile

PARTS = 16  # partial results that are combined at once
PROGRAMS_PER_SM = {16: 6, 32: 6, 64: 6, 128: 3, 256: 2}  # that fit, by padded head_dim


@kernel(do_not_specialize=["table_stride"])
def decode_attention_kernel(
    q: Pointer,  # [rows, KV_HEADS * GROUP, HEAD_DIM], last dimension contiguous
    kv: Pointer,  # [blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM], last two contiguous
    block_tables: Pointer,  # int32 [rows, table_stride]
    items: Pointer,  # int32 [capacity, 4]: row, first token, end, place in parts or -1
    num_items: Pointer,  # int32 [1]
    out: Pointer,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    parts: Pointer,  # float32 [places, KV_HEADS * GROUP, HEAD_DIM]
    part_sums: Pointer,  # float32 [places, KV_HEADS * GROUP]: log2 of the sum of exponentials
    q_stride: Scalar,
    q_head_stride: Scalar,
    kv_block_stride: Scalar,
    kv_head_stride: Scalar,
    kv_part_stride: Scalar,  # from a K tile to its V tile
    table_stride: Scalar,
    scale: Scalar,  # of q K^T, times log2 e
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    in_group = tl.arange(0, GROUP_PADDED) < GROUP
    columns = tl.arange(0, DIM_PADDED)
    inside = in_group[:, None] & (columns < HEAD_DIM)[None, :]
    for unit in range(tl.program_id(0), tl.load(num_items) * KV_HEADS, tl.num_programs(0)):
        item = items + unit // KV_HEADS * 4
        head = unit % KV_HEADS
        row = tl.load(item).to(tl.int64)
        start = tl.load(item + 1)
        end = tl.load(item + 2)
        place = tl.load(item + 3).to(tl.int64)

        heads = head * GROUP + tl.arange(0, GROUP_PADDED)
        queries = q + row * q_stride + heads[:, None] * q_head_stride + columns[None, :]
        query = widen(tl.load(queries, mask=inside, other=0.0), UPCAST)
        keys_of_head = kv + head.to(tl.int64) * kv_head_stride
        table = block_tables + row * table_stride
        peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)  # in powers of 2
        total = tl.zeros([GROUP_PADDED], tl.float32)
        sums = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
        aligned = start // TILE * TILE
        ids = block_ids(table, aligned, end, BLOCK_SIZE, TILE)
        for first in range(aligned, end, TILE):
            tokens = first + tl.arange(0, TILE)
            seen = (tokens >= start) & (tokens < end)
            tile = key_tile(
                keys_of_head, ids, first, kv_block_stride, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, TILE
            )
            ids = block_ids(table, first + TILE, end, BLOCK_SIZE, TILE)
            loaded = seen[:, None] & (columns < HEAD_DIM)[None, :]
            keys = widen(tl.load(tile, mask=loaded, other=0.0), UPCAST)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
            scores = tl.where(seen[None, :], scores, float("-inf"))  # not the whole tile
            new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, axis=1)
            # Memory past the end is arbitrary, and 0 * NaN is NaN: what no query sees is not read.
            values = widen(tl.load(tile + kv_part_stride, mask=loaded, other=0.0), UPCAST)
            sums = sums * shrink[:, None]
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
            peak = new_peak

        result = sums / tl.where(total > 0.0, total, 1.0)[:, None]  # an empty item gives zeros
        num_heads = KV_HEADS * GROUP
        in_heads = heads[:, None] * HEAD_DIM + columns[None, :]
        if place < 0:
            target = out + row * (num_heads * HEAD_DIM) + in_heads
            tl.store(target, narrow(result, out.dtype.element_ty, UPCAST), mask=inside)
        else:
            tl.store(part_sums + place * num_heads + heads, peak + tl.log2(total), mask=in_group)
            tl.store(parts + place * (num_heads * HEAD_DIM) + in_heads, result, mask=inside)


@kernel()
def combine_kernel(
    parts: Pointer,  # float32 [places, heads, HEAD_DIM]
    part_sums: Pointer,  # float32 [places, heads]
    row_starts: Pointer,  # int32 [rows + 1]: row i's places are [starts[i], starts[i + 1])
    out: Pointer,  # [rows, heads, HEAD_DIM]; only rows that have places are written
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    start = tl.load(row_starts + row).to(tl.int64)
    end = tl.load(row_starts + row + 1)
    columns = tl.arange(0, DIM_PADDED)
    peak = float("-inf")
    total = 0.0
    result = tl.zeros([DIM_PADDED], tl.float32)
    for first in range(start, end, PARTS):
        places = first + tl.arange(0, PARTS)
        used = places < end
        slots = places * num_heads + head
        log_sums = tl.load(part_sums + slots, mask=used, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(log_sums, axis=0))
        weights = tl.exp2(log_sums - new_peak)
        shrink = tl.exp2(peak - new_peak)
        inside = used[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(parts + slots[:, None] * HEAD_DIM + columns, mask=inside, other=0.0)
        result = result * shrink + tl.sum(values * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        peak = new_peak
    if end > start:
        target = out + (row * num_heads + head) * HEAD_DIM + columns
        combined = narrow(result / total, out.dtype.element_ty, UPCAST)
        tl.store(target, combined, mask=columns < HEAD_DIM)


def decode_programs(device: torch.device, head_dim: int) -> int:
    """How many programs run at once: what a launch uses, and what keys may be balanced over."""
    return num_multiprocessors(device) * PROGRAMS_PER_SM[padded_head_dim(head_dim)]


def decode_constants(num_heads: int, kv: Tensor) -> dict[str, Any]:
    """What ``decode_attention_kernel`` is compiled for, its launch options included.

    ``kv`` is [blocks, kv heads, 2, block_size, head_dim]. Raises ValueError for a head_dim above
    256.
    """
    _, num_kv_heads, _, block_size, head_dim = kv.shape
    group = num_heads // num_kv_heads
    padded = padded_head_dim(head_dim)
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PADDED": max(triton.next_power_of_2(group), 16),  # the least a matrix unit takes
        "HEAD_DIM": head_dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "TILE": TILE if padded < MAX_HEAD_DIM else TILE // 2,
        "UPCAST": INTERPRETING,
        "num_warps": 4,
        "num_stages": 3,
    }


def decode_attention_triton(
    q: Tensor, kv: Tensor, meta: AttentionMetadata, *, scale: float, window: int
) -> Tensor:
    """``kernels.decode_attention.decode_attention`` on a GPU.

    Reads the batch from ``meta``'s tensors alone: a graph that captured this call computes the
    batch they hold when it is replayed.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[1]
    work = meta.decode_items(window)
    constants = decode_constants(num_heads, kv)
    out = torch.empty((rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    parts = torch.empty(
        (work.num_places, num_heads, head_dim), dtype=torch.float32, device=q.device
    )
    part_sums = torch.empty((work.num_places, num_heads), dtype=torch.float32, device=q.device)
    programs = decode_programs(q.device, head_dim)
    if rows:
        decode_attention_kernel[(min(len(work.items) * num_kv_heads, programs),)](
            q,
            kv,
            meta.block_tables,
            work.items,
            work.count,
            out,
            parts,
            part_sums,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            meta.block_tables.shape[1],
            scale * LOG2_E,
            **constants,
        )
    if work.num_places:
        combine_kernel[(rows, num_heads)](
            parts,
            part_sums,
            work.row_starts,
            out,
            HEAD_DIM=head_dim,
            DIM_PADDED=constants["DIM_PADDED"],
            PARTS=PARTS,
            UPCAST=INTERPRETING,
        )
    return out
