"""KV blocks in 8 bits: a program packs or unpacks some tokens of a block, and sums its bytes.

``kernels.wire_quantization`` defines the layout, ``kernels.digest`` the digest. Eight elements are
one lane of 64 bits, two scales another. Keys and values are different programs' work.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.digest import GROUP, group_weights, in_group_weights
from kernels.gpu.language import INTERPRETING, Pointer, Scalar, Tile, kernel, narrow
from kernels.wire_quantization import LIMITS, SMALLEST, PackedLayout

ELEMENTS = 8192  # of a program
INT8_LIMIT, E4M3_LIMIT = tl.constexpr(LIMITS["int8"]), tl.constexpr(LIMITS["e4m3"])
FLOOR = tl.constexpr(SMALLEST)


@kernel()
def to_codes(x: Tile, e4m3: Scalar, E4M3: tl.constexpr, UPCAST: tl.constexpr) -> Tile:
    """Float32 within the format's limit, rounded to nearest even; as int8, whatever the format."""
    if E4M3 and e4m3:
        if UPCAST:  # the interpreter converts rightly what needs no rounding
            bits = x.to(tl.int32, bitcast=True)
            normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
            # Near 16384 a float's unit is e4m3's least number.
            small = ((tl.abs(x) + 16384.0) - 16384.0).to(tl.int32, bitcast=True)
            bits = tl.where(tl.abs(x) < 0.015625, small | (bits & -(2**31)), normal)
            x = bits.to(tl.float32, bitcast=True)
        codes = x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        codes = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23, where the unit is 1
    return codes


@kernel()
def from_codes(codes: Tile, e4m3: Scalar, E4M3: tl.constexpr) -> Tile:
    """The inverse of ``to_codes``: float32."""
    if E4M3 and e4m3:
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        x = codes.to(tl.float32)
    return x


@kernel()
def lane_weights(lanes: Tile) -> Tile:
    """The digest's weights of a row's lanes, uint64."""
    return in_group_weights(lanes % GROUP) * group_weights(lanes // GROUP)


@kernel()
def places(
    part: Scalar,  # 0 for keys, 1 for values
    group: Scalar,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tuple[Tile, Tile, Tile, Tile]:
    """Of a program's tokens, within a row: first element, first lane, scale; which there are."""
    tokens = group * TOKENS + tl.arange(0, TOKENS)
    tile, offset = tokens // BLOCK_SIZE * 2 + part, tokens % BLOCK_SIZE
    elements = (tile * BLOCK_SIZE + offset) * HEAD_DIM
    start = tile * (BLOCK_SIZE * (HEAD_DIM + 4))  # byte
    lanes = start // 8 + offset * (HEAD_DIM // 8)
    scales = start // 4 + BLOCK_SIZE * HEAD_DIM // 4 + offset
    return elements, lanes, scales, tokens < TILES // 2 * BLOCK_SIZE


@kernel()
def digest(
    values: Tile,  # int64 [TOKENS, LANES]
    lanes: Tile,  # their places
    scales: Tile,  # float32 [TOKENS]
    scale_places: Tile,
) -> Scalar:
    """These lanes' and half lanes' part of the row's digest."""
    total = tl.sum(tl.sum(values.to(tl.uint64) * lane_weights(lanes), axis=1), axis=0)
    halves = scales.to(tl.uint32, bitcast=True).to(tl.uint64) << (scale_places % 2 * 32)
    return total + tl.sum(halves * lane_weights(scale_places // 2), axis=0)


@kernel()
def quantize_kernel(
    rows: Pointer,  # [blocks, TILES, BLOCK_SIZE, HEAD_DIM]
    block_ids: Pointer,  # int64 [count]
    packed_lanes: Pointer,  # int64 [count, lanes of a packed row]
    packed_scales: Pointer,  # float32, the same memory
    sums: Pointer,  # int64 [count, groups, 2]
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
    LANES: tl.constexpr,  # of a token, padded
    E4M3_KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    index, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row_bytes: tl.constexpr = TILES * BLOCK_SIZE * (HEAD_DIM + 4)
    elements, lanes, scales, inside = places(part, group, TILES, BLOCK_SIZE, HEAD_DIM, TOKENS)
    columns, in_lane = tl.arange(0, LANES), tl.arange(0, 8)
    in_row = columns < HEAD_DIM // 8
    rows += tl.load(block_ids + index) * (TILES * BLOCK_SIZE * HEAD_DIM)
    source = elements[:, None, None] + columns[None, :, None] * 8 + in_lane[None, None, :]
    mask = inside[:, None, None] & in_row[None, :, None]
    x = tl.load(rows + source, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), axis=2), axis=1), FLOOR)
    e4m3 = (part == 0) & E4M3_KEYS
    limit = tl.where(e4m3, E4M3_LIMIT, INT8_LIMIT)
    scale = largest * tl.where(e4m3, 1 / E4M3_LIMIT, 1 / INT8_LIMIT)
    x *= tl.div_rn(tl.zeros_like(largest) + limit, largest)[:, None, None]
    codes = to_codes(x, e4m3, E4M3_KEYS, UPCAST).to(tl.int64) & 0xFF
    values = tl.sum(codes << (in_lane * 8)[None, None, :], axis=2)
    targets = lanes[:, None] + columns[None, :]
    scale = tl.where(inside, scale, 0.0)
    lanes_mask = inside[:, None] & in_row[None, :]
    tl.store(packed_lanes + index * (row_bytes // 8) + targets, values, mask=lanes_mask)
    tl.store(packed_scales + index * (row_bytes // 4) + scales, scale, mask=inside)
    sums += (index * tl.num_programs(1) + group) * 2 + part
    tl.store(sums, digest(values, targets, scale, scales).to(tl.int64))


@kernel()
def dequantize_kernel(
    packed: Pointer,  # int8 [count, bytes of a packed row]
    packed_lanes: Pointer,  # int64, the same memory
    packed_scales: Pointer,  # float32, the same memory
    block_ids: Pointer,  # int64 [count]
    rows: Pointer,  # [blocks, TILES, BLOCK_SIZE, HEAD_DIM]
    sums: Pointer,  # int64 [count, groups, 2]
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
    LANES: tl.constexpr,  # of a token, padded
    E4M3_KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    index, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row_bytes: tl.constexpr = TILES * BLOCK_SIZE * (HEAD_DIM + 4)
    elements, lanes, scales, inside = places(part, group, TILES, BLOCK_SIZE, HEAD_DIM, TOKENS)
    columns, element_columns = tl.arange(0, LANES), tl.arange(0, LANES * 8)
    sources = lanes[:, None] + columns[None, :]
    lanes_mask = inside[:, None] & (columns < HEAD_DIM // 8)[None, :]
    packed_lanes += index * (row_bytes // 8)
    values = tl.load(packed_lanes + sources, mask=lanes_mask, other=0)
    packed_scales += index * (row_bytes // 4)
    scale = tl.load(packed_scales + scales, mask=inside, other=0.0)
    sums += (index * tl.num_programs(1) + group) * 2 + part
    tl.store(sums, digest(values, sources, scale, scales).to(tl.int64))

    mask = inside[:, None] & (element_columns < HEAD_DIM)[None, :]
    packed += index * row_bytes
    codes = tl.load(packed + lanes[:, None] * 8 + element_columns[None, :], mask=mask, other=0)
    x = from_codes(codes, (part == 0) & E4M3_KEYS, E4M3_KEYS) * scale[:, None]
    rows += tl.load(block_ids + index) * (TILES * BLOCK_SIZE * HEAD_DIM)
    targets = rows + elements[:, None] + element_columns[None, :]
    tl.store(targets, narrow(x, rows.dtype.element_ty, UPCAST), mask=mask)


def quantize_blocks_triton(
    rows: Tensor, block_ids: Sequence[int], layout: PackedLayout, out: Tensor
) -> list[int]:
    """``kernels.wire_quantization.quantize_blocks`` on a GPU; waits for the result."""
    ids, sums = _ids_and_sums(block_ids, layout, rows.device)
    if len(ids):
        quantize_kernel[sums.shape](
            rows,
            ids,
            out.view(torch.int64),
            out.view(torch.float32),
            sums,
            **quantization_constants(layout),
        )
    return _digests(sums)


def dequantize_blocks_triton(
    packed: Tensor, block_ids: Sequence[int], layout: PackedLayout, rows: Tensor
) -> list[int]:
    """``kernels.wire_quantization.dequantize_blocks`` on a GPU; waits for the result."""
    ids, sums = _ids_and_sums(block_ids, layout, rows.device)
    if len(ids):
        dequantize_kernel[sums.shape](
            packed.view(torch.int8),
            packed.view(torch.int64),
            packed.view(torch.float32),
            ids,
            rows,
            sums,
            **quantization_constants(layout),
        )
    return _digests(sums)


def quantization_constants(layout: PackedLayout) -> dict[str, Any]:
    """What both kernels are compiled for."""
    lanes = triton.next_power_of_2(layout.head_dim // 8)
    return {
        "TILES": layout.num_tiles,
        "BLOCK_SIZE": layout.block_size,
        "HEAD_DIM": layout.head_dim,
        "TOKENS": ELEMENTS // (lanes * 8),
        "LANES": lanes,
        "E4M3_KEYS": layout.keys == "e4m3",
        "UPCAST": INTERPRETING,
        "num_warps": 8,
        "enable_fp_fusion": False,  # the twin rounds a product before it adds
    }


def _ids_and_sums(
    block_ids: Sequence[int], layout: PackedLayout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ids on the device, and [blocks, groups, 2] for the programs' parts of the digests."""
    groups = triton.cdiv(
        layout.num_tiles // 2 * layout.block_size, quantization_constants(layout)["TOKENS"]
    )
    ids = torch.tensor(block_ids, dtype=torch.int64).to(device)
    return ids, torch.empty((len(ids), groups, 2), dtype=torch.int64, device=device)


def _digests(sums: Tensor) -> list[int]:
    return [digest % (1 << 64) for digest in sums.sum((1, 2)).tolist()]
