"""Whole-block copies: in place, nothing beside it, and the digests of what was copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.block_copy import copy_blocks
from kernels.digest import digest_blocks as public_digest_blocks
from kernels.digest import digest_blocks_torch
from tests.kernels.implementation import (
    INTERPRETED,
    digest_blocks,
    gather_blocks,
    scatter_blocks,
)

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [8, 2048, 5000])
def test_gather_and_scatter_are_inverse(dtype: torch.dtype, elements: int) -> None:
    random = torch.Generator().manual_seed(elements)
    rows = torch.randint(0, 100, (9, elements), generator=random).to(dtype)
    ids = [7, 0, 3, 8]
    packed = torch.full((6, elements), 101).to(dtype)
    digests = gather_blocks(rows, ids, packed[1:5])
    assert digests == digest_blocks(rows, ids)
    for index, block in enumerate(ids):
        assert torch.equal(packed[1 + index], rows[block])
    assert (packed[0] == 101).all()
    assert (packed[5] == 101).all()

    target = torch.full((9, elements), 102).to(dtype)
    assert scatter_blocks(packed[1:5], ids, target) == digests
    for block in range(9):
        assert torch.equal(target[block], rows[block]) == (block in ids)
        assert (target[block] == 102).all() == (block not in ids)


def test_gather_may_repeat_a_block() -> None:
    rows = torch.arange(24.0).view(3, 8)
    out = torch.empty(3, 8)
    gather_blocks(rows, [2, 2, 1], out)
    assert torch.equal(out, rows[[2, 2, 1]])


def test_no_blocks() -> None:
    rows = torch.ones(3, 8)
    assert gather_blocks(rows, [], torch.empty(0, 8)) == []
    assert scatter_blocks(torch.empty(0, 8), [], rows) == []
    assert (rows == 1).all()


@pytest.mark.skipif(INTERPRETED, reason="on the CPU only")
class TestCopyBlocks:
    def test_from_read_only_memory(self) -> None:
        source = np.random.default_rng(1).integers(0, 256, (4, 4096), dtype=np.uint8)
        source.flags.writeable = False
        rows = np.full((5, 4096), 7, np.uint8)
        digests = copy_blocks(source, [3, 1], rows, [0, 4])
        assert (rows[[0, 4]] == source[[3, 1]]).all()
        assert (rows[1:4] == 7).all()
        assert digests == public_digest_blocks(torch.from_numpy(rows), [0, 4])

    @pytest.mark.parametrize("offset", [0, 8])  # bytes: on a line of the cache, and not
    @pytest.mark.parametrize("row_bytes", [64, 576, 2048, 2624])  # whole lines
    @pytest.mark.parametrize("count", [1, 4, 7])
    def test_some_rows_of_whole_lines(self, offset: int, row_bytes: int, count: int) -> None:
        memory = torch.full((9 * row_bytes + offset,), 7, dtype=torch.uint8)
        rows = memory[offset:].view(9, row_bytes).numpy()
        source = np.random.default_rng(1).integers(0, 256, (9, row_bytes), dtype=np.uint8)
        source_ids, block_ids = [3, 1, 8, 0, 6, 2, 7][:count], [8, 4, 0, 5, 1, 6, 3][:count]
        digests = copy_blocks(source, source_ids, rows, block_ids)
        assert (rows[block_ids] == source[source_ids]).all()
        others = [block for block in range(9) if block not in block_ids]
        assert (rows[others] == 7).all()
        assert (memory[:offset] == 7).all()
        assert digests == digest_blocks_torch(torch.from_numpy(source), source_ids)

    @pytest.mark.parametrize(("source_ids", "block_ids"), [([4], [0]), ([0], [5]), ([-1], [0])])
    def test_ids_outside(self, source_ids: list[int], block_ids: list[int]) -> None:
        rows = np.zeros((5, 64), np.uint8)
        with pytest.raises(IndexError, match="blocks"):
            copy_blocks(np.ones((4, 64), np.uint8), source_ids, rows, block_ids)
        assert not rows.any()

    def test_lists_of_two_lengths(self) -> None:
        rows = np.zeros((5, 64), np.uint8)
        with pytest.raises(ValueError, match="2 blocks cannot be copied to 1"):
            copy_blocks(rows.copy(), [0, 1], rows, [0])

    def test_rows_must_be_whole_lanes(self) -> None:
        rows = np.zeros((5, 12), np.uint8)
        with pytest.raises(ValueError, match="multiple of 8 bytes, got 12"):
            copy_blocks(rows.copy(), [0], rows, [0])
