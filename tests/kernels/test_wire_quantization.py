"""KV blocks in 8 bits: every byte by the definition, digests, error, and what stays untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.digest import digest_blocks
from kernels.wire_quantization import LIMITS, SMALLEST, Format, PackedLayout
from tests.kernels.implementation import dequantize_blocks, quantize_blocks
from tests.kernels.poison import unchanged

pytestmark = pytest.mark.usefixtures("implementation")

HEADS, LAYERS = 3, 2
TILES = HEADS * LAYERS * 2
# The values of e4m3's codes, from its definition; code 127 is NaN.
E4M3 = np.array(
    [code / 8 * 2.0**-6 for code in range(8)]
    + [(1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(8, 127)]
)
formats = pytest.mark.parametrize("keys", ["e4m3", "int8"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
shapes = pytest.mark.parametrize(("block_size", "head_dim"), [(16, 128), (64, 32), (8, 80)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(scaled: NDArray[np.float32], kind: Format) -> NDArray[np.int8]:
    """Rounded to nearest even, in float64."""
    wide = np.abs(scaled.astype(np.float64))
    if kind == "int8":
        return (np.sign(scaled) * np.rint(wide)).astype(np.int8)
    above = np.searchsorted(E4M3, wide).clip(1, 126)
    gaps = E4M3[above] - wide, wide - E4M3[above - 1]
    up = (gaps[0] < gaps[1]) | ((gaps[0] == gaps[1]) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.where(np.signbit(scaled), 128, 0)).astype(np.int8)


def decoded(stored: NDArray[np.int8], kind: Format) -> NDArray[np.float32]:
    if kind == "int8":
        return stored.astype(np.float32)
    values = E4M3[stored & 127] * np.where(stored < 0, -1.0, 1.0)
    return values.astype(np.float32)


def expected(row: Tensor, layout: PackedLayout) -> tuple[NDArray[np.uint8], Tensor]:
    """A block's packed bytes, and the block that they give, by the definition."""
    tiles = row.float().view(layout.num_tiles, layout.block_size, layout.head_dim).numpy()
    parts: list[NDArray[np.uint8]] = []
    restored = []
    for index, tile in enumerate(tiles):
        kind = "int8" if index % 2 else layout.keys
        limit = np.float32(LIMITS[kind])
        largest = np.maximum(np.abs(tile).max(-1, keepdims=True), np.float32(SMALLEST))
        stored = codes(tile * (limit / largest), kind)
        scales = largest * np.float32(1 / LIMITS[kind])
        parts += [stored.view(np.uint8).ravel(), scales.view(np.uint8).ravel()]
        restored.append(torch.from_numpy(decoded(stored, kind) * scales))
    return np.concatenate(parts), torch.stack(restored).to(row.dtype).view(-1)


@formats
@dtypes
@shapes
def test_bytes_digests_and_way_back(
    dtype: torch.dtype, block_size: int, head_dim: int, keys: Format
) -> None:
    layout = PackedLayout(TILES, block_size, head_dim, keys)
    elements = TILES * block_size * head_dim
    rows = torch.full((5, elements), torch.nan, dtype=dtype)
    rows[[3, 0]] = (normal(2, elements) * normal(2, elements, seed=1).exp()).to(dtype)
    rows[3, :head_dim] = 0
    rows[3, head_dim : 2 * head_dim] *= 1e-4
    ids = [3, 0, 3]
    out = torch.full((5, layout.row_bytes), 0xAA, dtype=torch.uint8)
    with unchanged(rows):
        digests = quantize_blocks(rows, ids, layout, out[1:4])
    assert digests == digest_blocks(out, [1, 2, 3])
    assert (out[[0, 4]] == 0xAA).all()
    for place, block in enumerate(ids, start=1):
        assert np.array_equal(out[place].numpy(), expected(rows[block], layout)[0])

    target = torch.full_like(rows, torch.nan)
    with unchanged(target):
        assert dequantize_blocks(out[1:3], [4, 1], layout, target) == digests[:2]
        for place, block in ((4, 3), (1, 0)):
            assert torch.equal(target[place], expected(rows[block], layout)[1])
        target[[4, 1]] = torch.nan


def test_ties_round_to_even() -> None:
    """At scale 1: all midpoints of e4m3's values in keys, of integers in values."""
    layout = PackedLayout(2, 16, 16)
    tile = torch.zeros(2, 16, 16)
    midpoints = torch.from_numpy((E4M3[1:] + E4M3[:-1]) / 2).float()
    # A token's first element sets its scale.
    tile[0, :, 1:9] = torch.cat((midpoints, torch.zeros(2))).view(16, 8)
    tile[0, :, 9:] = -tile[0, :, 1:8]
    tile[1, :, 1:] = (torch.arange(240) - 120).view(16, 15) + 0.5
    tile[:, :, 0] = torch.tensor([[448.0], [127.0]])
    out = torch.empty(1, layout.row_bytes, dtype=torch.uint8)
    quantize_blocks(tile.view(1, -1), [0], layout, out)
    assert np.array_equal(out[0].numpy(), expected(tile.view(-1), layout)[0])
    values = out[0, layout.tile_bytes :][: layout.payload_bytes].view(torch.int8)
    assert (values.view(16, 16)[:, 1:] % 2 == 0).all()


def relative_error(blocks: Tensor, keys: Format) -> tuple[Tensor, Tensor]:
    """Of keys and values [tokens, head_dim], each on its own; both are ``blocks``."""
    tokens, head_dim = blocks.shape
    layout = PackedLayout(2, tokens, head_dim, keys)
    row = blocks.repeat(2, 1).view(1, -1)
    out = torch.empty(1, layout.row_bytes, dtype=torch.uint8)
    back = torch.empty_like(row)
    quantize_blocks(row, [0], layout, out)
    dequantize_blocks(out, [0], layout, back)
    keys_back, values_back = back.view(2, tokens, head_dim)
    return keys_back - blocks, values_back - blocks


def test_error_of_gaussian_elements() -> None:
    blocks = normal(256, 128)
    e4m3, int8 = (error.norm() / blocks.norm() for error in relative_error(blocks, "e4m3"))
    assert 0.025 < e4m3 < 0.027
    assert 0.0060 < int8 < 0.0067


def test_error_beside_channels_ten_times_as_large() -> None:
    blocks = normal(256, 128)
    blocks[:, ::32] *= 10
    small = torch.arange(128) % 32 != 0
    e4m3, int8 = (
        error[:, small].norm() / blocks[:, small].norm() for error in relative_error(blocks, "e4m3")
    )
    assert 0.025 < e4m3 < 0.028
    assert 0.035 < int8 < 0.047


def test_a_run_of_heads_is_a_slice() -> None:
    whole, head = PackedLayout(TILES, 16, 32), PackedLayout(LAYERS * 2, 16, 32)
    row = normal(1, TILES * 16 * 32)
    out = torch.empty(1, whole.row_bytes, dtype=torch.uint8)
    quantize_blocks(row, [0], whole, out)
    alone = torch.empty(HEADS, head.row_bytes, dtype=torch.uint8)
    quantize_blocks(row.view(HEADS, -1), range(HEADS), head, alone)
    assert torch.equal(out.view(-1), alone.view(-1))


def test_no_blocks() -> None:
    layout = PackedLayout(2, 8, 8)
    rows, none = torch.ones(2, 128), torch.empty(0, layout.row_bytes, dtype=torch.uint8)
    assert quantize_blocks(rows, [], layout, none) == []
    assert dequantize_blocks(none, [], layout, rows) == []
    assert (rows == 1).all()


@pytest.mark.parametrize(("block_size", "head_dim"), [(12, 64), (16, 36)])
def test_sizes_must_be_multiples_of_8(block_size: int, head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 8, got {block_size} and {head_dim}"):
        PackedLayout(2, block_size, head_dim)
