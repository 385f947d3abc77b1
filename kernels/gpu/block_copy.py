"""Whole-block copies: one program per block and 16 KiB, in the widest lanes a row divides into."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import Pointer, kernel

LANES = 2048  # of a program


@kernel()
def block_copy_kernel(
    rows: Pointer,  # [blocks, N]
    packed: Pointer,  # [count, N]
    block_ids: Pointer,  # int64 [count]
    N: tl.constexpr,
    LANES: tl.constexpr,
    SCATTER: tl.constexpr,  # from packed to rows
) -> None:
    index = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + index)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lanes < N
    if SCATTER:
        tl.store(rows + block * N + lanes, tl.load(packed + index * N + lanes, inside), inside)
    else:
        tl.store(packed + index * N + lanes, tl.load(rows + block * N + lanes, inside), inside)


def gather_blocks_triton(rows: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """``kernels.block_copy.gather_blocks`` on a GPU."""
    _launch(rows, out, block_ids, scatter=False)


def scatter_blocks_triton(source: Tensor, block_ids: Tensor, rows: Tensor) -> None:
    """``kernels.block_copy.scatter_blocks`` on a GPU."""
    _launch(rows, source, block_ids, scatter=True)


def _launch(rows: Tensor, packed: Tensor, block_ids: Tensor, *, scatter: bool) -> None:
    if len(block_ids) == 0:
        return
    row_bytes = rows.shape[1] * rows.element_size()
    lane = torch.int64 if row_bytes % 8 == 0 else torch.uint8
    lanes = rows.view(lane)
    grid = (len(block_ids), triton.cdiv(lanes.shape[1], LANES))
    block_copy_kernel[grid](
        lanes, packed.view(lane), block_ids, N=lanes.shape[1], LANES=LANES, SCATTER=scatter
    )
