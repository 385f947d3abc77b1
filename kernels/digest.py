"""A 64-bit checksum of KV blocks, as fast as memory, the same on CPU and GPU.

A block's bytes are little-endian 64-bit lanes x_0, x_1, ... in groups of 256; its digest is

    sum of x_i * a_(i mod 256) * b_(i div 256)  mod 2^64,
    a_j = splitmix64(j) | 1,    b_g = splitmix64(256 + g) | 1

with splitmix64(i) the i-th output (from 0) of Steele, Lea and Flood's generator seeded with 0.
Two small tables instead of one weight for every lane keep the weights in the cache, so that a
processor reads each lane once and multiplies it once.

The weights are odd, so a change within one lane always changes the digest. A change of several
lanes goes unseen when the weighted differences cancel: for weights drawn at random that has
probability 2^-(63 - t) at most, where 2^t is the largest power of two dividing every difference.
Exchanged blocks and lanes, zeroed and stale memory are thus found. It is a checksum against
accidents: whoever knows the definition can construct collisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.blocks import digest_blocks_native

LANE_BYTES = 8
GROUP = 256  # lanes


def digest_blocks(rows: Tensor, block_ids: Sequence[int]) -> list[int]:
    """The digest of each block, unsigned.

    ``rows`` is the arena as [num_blocks, row_elements], contiguous, of any type. Raises ValueError
    when a row's bytes are not a multiple of 8, IndexError for an id outside the arena.
    """
    check_lanes(rows.shape[1] * rows.element_size())
    if use_triton(rows):
        from kernels.gpu.block_copy import digest_blocks_triton

        return digest_blocks_triton(rows, block_ids)
    native = library.load()
    if native is not None:
        ids = checked_ids(block_ids, len(rows))
        return digest_blocks_native(native, rows.view(torch.uint8).numpy(), ids)
    return digest_blocks_torch(rows, block_ids)


def check_lanes(row_bytes: int) -> None:
    """Raise ValueError unless a row is a whole number of lanes."""
    if row_bytes % LANE_BYTES:
        raise ValueError(f"a row must be a multiple of {LANE_BYTES} bytes, got {row_bytes}")


def checked_ids(block_ids: Sequence[int], num_blocks: int) -> NDArray[np.int64]:
    """The ids as an array. Raises IndexError unless each is one of ``num_blocks``."""
    ids = np.asarray(block_ids, np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < num_blocks):
        raise IndexError(f"blocks {ids.min()} .. {ids.max()} of {num_blocks}")
    return ids


def digest_blocks_torch(rows: Tensor, block_ids: Sequence[int]) -> list[int]:
    """``digest_blocks`` without a compiler."""
    # torch multiplies 64-bit integers at a fifth of numpy's rate; uint8 is a type both know.
    lanes = rows.view(torch.uint8).numpy().view("<u8")
    weights = _weights(lanes.shape[1])
    return [int(np.dot(lanes[block], weights)) for block in block_ids]


@lru_cache(maxsize=4)
def _weights(count: int) -> NDArray[np.uint64]:
    """The product of both weights for each of ``count`` lanes."""
    num_groups = -(-count // GROUP)
    z = np.arange(1, GROUP + num_groups + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    weights: NDArray[np.uint64] = np.outer(z[GROUP:], z[:GROUP]).reshape(-1)[:count]
    return weights
