"""Addresses of keys in the paged cache, for both attention kernels."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import triton.language as tl

from kernels.gpu.language import Pointer, Scalar, Tile, kernel


@kernel()
def block_ids(
    table: Pointer,  # int32: the row's blocks
    first: Scalar,  # token
    end: Scalar,  # tokens from here on have no block
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> Tile:
    """The blocks of tokens [first, first + TILE).

    When tiles divide blocks, ``first`` is a multiple of TILE and one id serves the tile.
    Otherwise there is one for each token; those past ``end`` get block 0.
    """
    if BLOCK_SIZE % TILE == 0:
        ids = tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        tokens = first + tl.arange(0, TILE)
        ids = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    return ids


@kernel()
def key_tile(
    kv: Pointer,  # at the KV head: [blocks, ..., BLOCK_SIZE, HEAD_DIM], last two contiguous
    ids: Tile,  # of block_ids
    first: Scalar,
    kv_block_stride: Scalar,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> Tile:
    """Pointers [TILE, DIM_PADDED] to the keys of tokens [first, first + TILE)."""
    lanes = tl.arange(0, TILE)
    columns = tl.arange(0, DIM_PADDED)
    offsets = ids.to(tl.int64) * kv_block_stride
    if BLOCK_SIZE % TILE == 0:
        kv += offsets + first % BLOCK_SIZE * HEAD_DIM
        tile = kv + (lanes[:, None] * HEAD_DIM + columns[None, :])
    else:
        offsets += (first + lanes) % BLOCK_SIZE * HEAD_DIM
        tile = kv + offsets[:, None] + columns[None, :]
    return tile
