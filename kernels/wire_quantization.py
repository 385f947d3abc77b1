"""KV blocks in 8 bits for the wire: quantised while they are packed, and back.

A block's row is [kv heads, layers, 2, block_size, head_dim]: tiles of one head's and layer's keys,
and of its values. Packed, each tile is ``block_size * head_dim`` bytes, an element each, and then
``block_size`` float32 scales, a token each; tiles keep their order, so that any run of heads is
still one contiguous slice. Digests are of the packed bytes, as ``kernels.digest`` defines them.

A token's elements x, of largest magnitude m, become ``round(x * (limit / m))``, to nearest even,
with the scale ``m * (1 / limit)``, and return as scale times element, rounded to the row's type:

- "int8": integers to 127. Relative error (2-norm) on Gaussian elements 0.65 %.
- "e4m3": 8-bit floats of 4 exponent bits (Micikevicius et al. 2022) to 448. 2.6 %.

In keys some channels are far larger than the rest. With one in 32 ten times as large, the error on
the others is 4.2 % in int8 and 2.6 % in e4m3: so values travel in int8, and keys in e4m3 unless
asked otherwise. Elements must be finite; m is at least 1e-30.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.wire_quantization import dequantize_blocks_native, quantize_blocks_native
from kernels.digest import checked_ids, digest_blocks

Format = Literal["int8", "e4m3"]

VALUES: Format = "int8"
SCALE_BYTES = 4
LIMITS: dict[Format, float] = {"int8": 127.0, "e4m3": 448.0}
SMALLEST = 1e-30
_DTYPES: dict[Format, torch.dtype] = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Of a quantised row. Raises ValueError unless both sizes are multiples of 8."""

    num_tiles: int  # kv heads * layers * 2: keys and values in turn
    block_size: int  # tokens
    head_dim: int
    keys: Format = "e4m3"

    def __post_init__(self) -> None:
        if self.block_size % 8 or self.head_dim % 8:
            raise ValueError(
                "quantised blocks need a block_size and a head_dim that are multiples of 8, got "
                f"{self.block_size} and {self.head_dim}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_tiles, block_size, head_dim)."""
        return (self.num_tiles, self.block_size, self.head_dim)

    @property
    def num_elements(self) -> int:
        """Of a row."""
        return self.num_tiles * self.block_size * self.head_dim

    @property
    def payload_bytes(self) -> int:
        """Of a tile, before its scales."""
        return self.block_size * self.head_dim

    @property
    def tile_bytes(self) -> int:
        """A multiple of 32."""
        return self.payload_bytes + self.block_size * SCALE_BYTES

    @property
    def row_bytes(self) -> int:
        """A multiple of 64."""
        return self.num_tiles * self.tile_bytes


def quantize_blocks(
    rows: Tensor, block_ids: Sequence[int], layout: PackedLayout, out: Tensor
) -> list[int]:
    """``out[i]`` becomes block ``block_ids[i]`` in 8 bits; the digests of ``out``.

    ``rows`` is the arena as [num_blocks, row_elements] in float32, float16 or bfloat16, ``out``
    uint8 [len(block_ids), layout.row_bytes], both contiguous. Done when this returns.
    """
    if use_triton(rows):
        from kernels.gpu.wire_quantization import quantize_blocks_triton

        return quantize_blocks_triton(rows, block_ids, layout, out)
    native = library.load()
    if native is not None:
        ids, e4m3_keys = checked_ids(block_ids, len(rows)), layout.keys == "e4m3"
        return quantize_blocks_native(native, rows, ids, layout.shape, out, e4m3_keys=e4m3_keys)
    return quantize_blocks_torch(rows, block_ids, layout, out)


def dequantize_blocks(
    packed: Tensor, block_ids: Sequence[int], layout: PackedLayout, rows: Tensor
) -> list[int]:
    """``rows[block_ids[i]]`` becomes what ``packed[i]`` holds; the digests of ``packed``.

    The inverse of ``quantize_blocks``, up to its rounding. No two of ``block_ids`` may be equal.
    Done when this returns.
    """
    if use_triton(rows):
        from kernels.gpu.wire_quantization import dequantize_blocks_triton

        return dequantize_blocks_triton(packed, block_ids, layout, rows)
    native = library.load()
    if native is not None:
        ids, e4m3_keys = checked_ids(block_ids, len(rows)), layout.keys == "e4m3"
        return dequantize_blocks_native(
            native, packed, ids, layout.shape, rows, e4m3_keys=e4m3_keys
        )
    return dequantize_blocks_torch(packed, block_ids, layout, rows)


def quantize_blocks_torch(
    rows: Tensor, block_ids: Sequence[int], layout: PackedLayout, out: Tensor
) -> list[int]:
    """``quantize_blocks`` in torch."""
    blocks = rows[torch.tensor(block_ids, dtype=torch.int64)]
    for kind, elements, payload, scales in _parts(blocks, out, layout):
        tokens = elements.to(torch.float32, copy=True)
        largest = tokens.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)
        # torch takes limit / largest for limit * (1 / largest), which rounds twice.
        tokens *= torch.tensor(LIMITS[kind]) / largest
        rounded = tokens.round_() if kind == "int8" else tokens
        payload.copy_(rounded.to(_DTYPES[kind]).view(torch.uint8))
        scales.copy_((largest * (1 / LIMITS[kind])).view(torch.uint8))
    return digest_blocks(out, range(len(out)))


def dequantize_blocks_torch(
    packed: Tensor, block_ids: Sequence[int], layout: PackedLayout, rows: Tensor
) -> list[int]:
    """``dequantize_blocks`` in torch."""
    blocks = torch.empty((len(packed), rows.shape[1]), dtype=rows.dtype)
    for kind, elements, payload, scales in _parts(blocks, packed, layout):
        codes = payload.contiguous().view(_DTYPES[kind]).float()
        elements.copy_(codes * scales.contiguous().view(torch.float32))
    rows[torch.tensor(block_ids, dtype=torch.int64)] = blocks
    return digest_blocks(packed, range(len(packed)))


def _parts(
    blocks: Tensor, packed: Tensor, layout: PackedLayout
) -> Iterator[tuple[Format, Tensor, Tensor, Tensor]]:
    """Of the keys, then of the values: their format, and views of both forms of the blocks.

    The elements [blocks, tiles, block_size, head_dim]; their bytes when packed, of the same shape;
    and their scales' bytes [blocks, tiles, block_size, 4].
    """
    pairs = len(packed), layout.num_tiles // 2
    tokens, head_dim, end = layout.block_size, layout.head_dim, layout.payload_bytes
    elements = blocks.view(*pairs, 2, tokens, head_dim).unbind(2)
    tiles = packed.view(*pairs, 2, layout.tile_bytes).unbind(2)
    for kind, part, tile in zip((layout.keys, VALUES), elements, tiles, strict=True):
        payload = tile[..., :end].view(*pairs, tokens, head_dim)
        yield kind, part, payload, tile[..., end:].view(*pairs, tokens, SCALE_BYTES)
