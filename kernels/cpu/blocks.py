"""Block copies and digests in C++, on memory and ids that the caller has checked."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

LANE_BYTES = 8

Rows = NDArray[np.uint8]  # [blocks, row_bytes], contiguous
Ids = NDArray[np.int64]  # [count], each a row


def copy_blocks_native(
    library: ctypes.CDLL,
    source: Rows,
    source_ids: Ids,
    rows: Rows,
    block_ids: Ids,
    keep_cached: bool,
) -> list[int]:
    """``kernels.block_copy.copy_blocks``; ``keep_cached`` if the copy is read again at once."""
    digests = np.empty(len(block_ids), np.uint64)
    library.copy_blocks(
        _address(source),
        source_ids.ctypes,
        _address(rows),
        block_ids.ctypes,
        ctypes.c_int64(len(block_ids)),
        ctypes.c_int64(rows.shape[1] // LANE_BYTES),
        ctypes.c_int64(keep_cached),
        digests.ctypes,
    )
    copied: list[int] = digests.tolist()
    return copied


def digest_blocks_native(library: ctypes.CDLL, rows: Rows, block_ids: Ids) -> list[int]:
    """``kernels.digest.digest_blocks``."""
    digests = np.empty(len(block_ids), np.uint64)
    library.digest_blocks(
        _address(rows),
        block_ids.ctypes,
        ctypes.c_int64(len(block_ids)),
        ctypes.c_int64(rows.shape[1] // LANE_BYTES),
        digests.ctypes,
    )
    found: list[int] = digests.tolist()
    return found


def _address(rows: Rows) -> ctypes.c_void_p:
    return ctypes.c_void_p(rows.ctypes.data)
