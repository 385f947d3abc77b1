"""Block digests against the definition in plain integers."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from kernels.digest import digest_blocks as public_digest_blocks
from tests.kernels.implementation import digest_blocks

pytestmark = pytest.mark.usefixtures("implementation")

MASK = (1 << 64) - 1


def splitmix64(index: int) -> int:
    z = (0x9E3779B97F4A7C15 * (index + 1)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def defined(row: Tensor) -> int:
    content = bytes(row.contiguous().view(torch.uint8).tolist())
    lanes = struct.unpack(f"<{len(content) // 8}Q", content)
    total = 0
    for index, lane in enumerate(lanes):
        in_group, group = splitmix64(index % 256) | 1, splitmix64(256 + index // 256) | 1
        total += lane * in_group * group
    return total & MASK


def test_splitmix64_is_the_published_generator() -> None:
    # The first outputs for seed 0, as in the reference implementation's documentation.
    assert [splitmix64(index) for index in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("lanes", [1, 7, 2048, 2049])
def test_equals_the_definition(dtype: torch.dtype, lanes: int) -> None:
    random = torch.Generator().manual_seed(lanes)
    rows = torch.randint(0, 256, (4, lanes * 8), generator=random, dtype=torch.uint8).view(dtype)
    assert digest_blocks(rows, [2, 0, 2]) == [defined(rows[2]), defined(rows[0]), defined(rows[2])]


def test_no_blocks() -> None:
    assert digest_blocks(torch.zeros(2, 8), []) == []


def test_every_single_bit_counts() -> None:
    rows = torch.randint(0, 256, (1, 64), dtype=torch.uint8)
    (before,) = digest_blocks(rows, [0])
    for bit in (0, 7, 63, 64, 300, 511):
        changed = rows.clone()
        changed[0, bit // 8] ^= 1 << bit % 8
        assert digest_blocks(changed, [0]) != [before]


def test_exchanged_lanes_and_moved_content_change_it() -> None:
    rows = torch.zeros(3, 4, dtype=torch.int64)
    rows[0, 0], rows[1, 1] = 5, 5
    assert len(set(digest_blocks(rows, [0, 1, 2]))) == 3


def test_rows_must_be_whole_lanes() -> None:
    with pytest.raises(ValueError, match="multiple of 8 bytes, got 12"):
        public_digest_blocks(torch.zeros(2, 3), [0])
