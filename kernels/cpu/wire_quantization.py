"""KV blocks in 8 bits and back in C++, on memory and ids that the caller has checked."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.library import DTYPES

Shape = tuple[int, int, int]  # of a row: tiles, block_size, head_dim


def quantize_blocks_native(
    library: ctypes.CDLL,
    rows: Tensor,
    block_ids: NDArray[np.int64],
    shape: Shape,
    out: Tensor,
    *,
    e4m3_keys: bool,
) -> list[int]:
    """``kernels.wire_quantization.quantize_blocks``."""
    digests = np.empty(len(block_ids), np.uint64)
    library.quantize_blocks(
        DTYPES[rows.dtype],
        rows.data_ptr(),
        block_ids.ctypes,
        len(block_ids),
        *shape,
        e4m3_keys,
        out.data_ptr(),
        digests.ctypes,
    )
    written: list[int] = digests.tolist()
    return written


def dequantize_blocks_native(
    library: ctypes.CDLL,
    packed: Tensor,
    block_ids: NDArray[np.int64],
    shape: Shape,
    rows: Tensor,
    *,
    e4m3_keys: bool,
) -> list[int]:
    """``kernels.wire_quantization.dequantize_blocks``."""
    digests = np.empty(len(block_ids), np.uint64)
    library.dequantize_blocks(
        DTYPES[rows.dtype],
        packed.data_ptr(),
        block_ids.ctypes,
        len(block_ids),
        *shape,
        e4m3_keys,
        rows.data_ptr(),
        digests.ctypes,
    )
    read: list[int] = digests.tolist()
    return read
