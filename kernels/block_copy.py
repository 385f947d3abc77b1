"""Copies whole blocks between the KV arena and a contiguous buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton


def gather_blocks(rows: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """``out[i] = rows[block_ids[i]]``.

    ``rows`` is the arena as [num_blocks, row_elements], ``out`` [len(block_ids), row_elements],
    both contiguous and of one type; ``block_ids`` is int64. A block may occur more than once.
    """
    if use_triton(rows):
        from kernels.gpu.block_copy import gather_blocks_triton

        gather_blocks_triton(rows, block_ids, out)
    else:
        gather_blocks_torch(rows, block_ids, out)


def scatter_blocks(source: Tensor, block_ids: Tensor, rows: Tensor) -> None:
    """``rows[block_ids[i]] = source[i]``: the inverse of ``gather_blocks``.

    No two of ``block_ids`` may be equal.
    """
    if use_triton(rows):
        from kernels.gpu.block_copy import scatter_blocks_triton

        scatter_blocks_triton(source, block_ids, rows)
    else:
        scatter_blocks_torch(source, block_ids, rows)


def gather_blocks_torch(rows: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """``gather_blocks`` in torch."""
    torch.index_select(rows, 0, block_ids, out=out)


def scatter_blocks_torch(source: Tensor, block_ids: Tensor, rows: Tensor) -> None:
    """``scatter_blocks`` in torch."""
    rows.index_copy_(0, block_ids, source)
