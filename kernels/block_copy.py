"""Copies whole blocks, and computes their digests on the way: what is read once is summed once.

Every operation returns the digests of the blocks it copied, in order; ``kernels.digest`` defines
them. A row's bytes must be a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.blocks import copy_blocks_native
from kernels.digest import check_lanes, checked_ids, digest_blocks_torch


def gather_blocks(rows: Tensor, block_ids: Sequence[int], out: Tensor) -> list[int]:
    """``out[i] = rows[block_ids[i]]``; the digests.

    ``rows`` is the arena as [num_blocks, row_elements], ``out`` [len(block_ids), row_elements],
    both contiguous and of one type. A block may occur more than once. Done when this returns.
    """
    if use_triton(rows):
        from kernels.gpu.block_copy import gather_blocks_triton

        return gather_blocks_triton(rows, block_ids, out)
    # What is packed is sent or stored next.
    positions = range(len(block_ids))
    return _copy(_bytes(rows), block_ids, _bytes(out), positions, keep_cached=True)


def scatter_blocks(source: Tensor, block_ids: Sequence[int], rows: Tensor) -> list[int]:
    """``rows[block_ids[i]] = source[i]``, the inverse of ``gather_blocks``; the digests.

    No two of ``block_ids`` may be equal. Done when this returns.
    """
    if use_triton(rows):
        from kernels.gpu.block_copy import scatter_blocks_triton

        return scatter_blocks_triton(source, block_ids, rows)
    return copy_blocks(_bytes(source), range(len(block_ids)), _bytes(rows), block_ids)


def copy_blocks(
    source: NDArray[np.uint8],
    source_ids: Sequence[int],
    rows: NDArray[np.uint8],
    block_ids: Sequence[int],
) -> list[int]:
    """``rows[block_ids[i]] = source[source_ids[i]]``, on the CPU; the digests of what was written.

    Both are [blocks, row_bytes], contiguous and apart; ``source`` may be read-only. Should another
    process change the source meanwhile, the digests are still those of what was written.
    Raises IndexError for an id outside its array, ValueError for rows that are not whole lanes and
    for id lists of two lengths.
    """
    return _copy(source, source_ids, rows, block_ids, keep_cached=False)


def _copy(
    source: NDArray[np.uint8],
    source_ids: Sequence[int],
    rows: NDArray[np.uint8],
    block_ids: Sequence[int],
    *,
    keep_cached: bool,
) -> list[int]:
    check_lanes(rows.shape[1])
    from_ids = checked_ids(source_ids, len(source))
    to_ids = checked_ids(block_ids, len(rows))
    if len(from_ids) != len(to_ids):
        raise ValueError(f"{len(from_ids)} blocks cannot be copied to {len(to_ids)}")
    native = library.load()
    if native is not None:
        return copy_blocks_native(native, source, from_ids, rows, to_ids, keep_cached)
    for from_id, to_id in zip(from_ids, to_ids, strict=True):
        rows[to_id] = source[from_id]
    return digest_blocks_torch(torch.from_numpy(rows), block_ids)


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    as_bytes: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return as_bytes
