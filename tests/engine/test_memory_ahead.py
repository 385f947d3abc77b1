"""Memory just ahead of the blocks in use is there before they are taken, and no more than that."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine import memory_ahead
from engine.block_pool import BlockPool
from engine.memory_ahead import MemoryAhead
from kernels.cpu.memory import populate, private_zeros
from kernels.shared_memory import shared_zeros

PAGE = mmap.PAGESIZE
BLOCKS, ROW = 64, 4 * PAGE  # bytes
AHEAD, AT_ONCE = 8, 4  # blocks

release = tuple(map(int, platform.release().split(".")[:2]))
pytestmark = pytest.mark.skipif(release < (5, 14), reason="needs Linux 5.14")


def num_ready(rows: Tensor) -> int:
    """Rows from the first on that the system has given all of their memory."""
    pages = (ctypes.c_ubyte * (rows.nbytes // PAGE))()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(
        ctypes.c_void_p(rows.data_ptr()), ctypes.c_size_t(rows.nbytes), ctypes.byref(pages)
    )
    assert not failed, ctypes.get_errno()
    each = ROW // PAGE
    ready = [all(pages[row * each : (row + 1) * each]) for row in range(len(rows))]
    assert ready == sorted(ready, reverse=True), "there are gaps"
    return sum(ready)


@pytest.fixture(params=[private_zeros, shared_zeros])
def rows(request: pytest.FixtureRequest) -> Tensor:
    make: Callable[[tuple[int, ...], torch.dtype], Tensor] = request.param
    return make((BLOCKS, ROW), torch.uint8)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockPool]:
    monkeypatch.setattr(memory_ahead, "AHEAD", AHEAD * ROW)
    monkeypatch.setattr(memory_ahead, "AT_ONCE", AT_ONCE * ROW)
    return BlockPool(BLOCKS, 16)


def settle(ahead: MemoryAhead) -> None:
    """Wait for all that was asked for."""
    ahead._executor.submit(int).result(timeout=60)


def test_memory_is_ready_ahead_of_the_blocks_taken(rows: Tensor, pool: BlockPool) -> None:
    assert num_ready(rows) == 0
    ahead = MemoryAhead(rows, pool)
    try:
        settle(ahead)
        assert num_ready(rows) == AHEAD
        taken = 0
        for count in (1, 2, 10, 3):
            assert pool.allocate(count)
            taken += count
            settle(ahead)
            assert taken + AHEAD - AT_ONCE < num_ready(rows) <= taken + AHEAD
        assert pool.allocate(BLOCKS - taken)
        settle(ahead)
        assert num_ready(rows) == BLOCKS
    finally:
        ahead.close()


def test_blocks_taken_again_take_no_more_memory(rows: Tensor, pool: BlockPool) -> None:
    ahead = MemoryAhead(rows, pool)
    try:
        for _ in range(20):
            blocks = pool.allocate(4)
            assert blocks is not None
            pool.release(blocks)
        settle(ahead)
        assert num_ready(rows) == 4 + AHEAD
    finally:
        ahead.close()


def test_memory_in_use_keeps_what_it_holds(rows: Tensor) -> None:
    rows[:10] = 7
    populate(rows[3:20])
    assert num_ready(rows) == 20
    assert (rows[:10] == 7).all()
    assert not rows[10:].any()
