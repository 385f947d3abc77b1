"""What routers are told of a worker with tiers: a block is held until it is nowhere any more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from engine.cache_feed import CacheFeed
from engine.tiers.disk import DiskTier
from engine.tiers.host import HostTier
from engine.tiers.tier import Tier
from protocol.hashing import block_key
from router.cached_blocks import CachedBlocks
from tests.tiers.worker import ROW_BYTES, TieredWorker, prompt

NUM_BLOCKS = 12  # of the pool


def tell(feed: CacheFeed, known: CachedBlocks) -> None:
    while (message := feed.take()) is not None:
        assert known.apply(message)


def held(worker: TieredWorker, tiers: Sequence[Tier]) -> set[int]:
    names = {*worker.pool.findable(), *(name for tier in tiers for name in tier.slots.names())}
    return set(map(block_key, names))


def make(directory: Path, slots: Sequence[int]) -> list[Tier]:
    """A disk of the last number of slots; before it, host memory of the first of two."""
    disk = DiskTier(directory, slots[-1] * ROW_BYTES, ROW_BYTES, b"")
    return [HostTier(slots[0] * ROW_BYTES, ROW_BYTES, disk), disk] if len(slots) == 2 else [disk]


@pytest.mark.parametrize("slots", [(3,), (30,), (2, 5), (5, 30)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_routers_know_what_pool_and_tiers_hold(
    tmp_path: Path, slots: Sequence[int], seed: int
) -> None:
    async def run() -> None:
        random = Random(seed)
        tiers = make(tmp_path, slots)
        worker = TieredWorker(NUM_BLOCKS, *tiers)
        feed, late = CacheFeed(worker.cache.held), CacheFeed(worker.cache.held)
        known = CachedBlocks()
        async with worker.running():
            for turn in range(25):
                worker.add(str(turn), prompt(random.randrange(4), random.randint(1, 8)))
                await worker.finish(str(turn))
                if random.random() < 0.7:
                    await worker.settle()
                tell(feed, known)
            await worker.settle()
            tell(feed, known)
            assert known.keys == held(worker, tiers)
            late.restart()
            snapshot = CachedBlocks()
            tell(late, snapshot)
            assert snapshot.keys == known.keys

    asyncio.run(run())


def test_a_block_that_only_moves_is_no_news(tmp_path: Path) -> None:
    async def run() -> None:
        [disk] = make(tmp_path, [64])
        worker = TieredWorker(NUM_BLOCKS, disk)
        feed, known = CacheFeed(worker.cache.held), CachedBlocks()
        async with worker.running():
            for first in range(3):
                await worker.ask(str(first), prompt(first, 8))
            tell(feed, known)
            assert len(known.keys) == 3 * 8 > NUM_BLOCKS
            worker.pool.release(worker.pool.allocate(NUM_BLOCKS) or [])  # evicts what is left
            assert not list(worker.pool.findable())
            assert feed.take() is None

    asyncio.run(run())


def test_a_router_hears_at_once_of_what_a_former_process_left(tmp_path: Path) -> None:
    async def run() -> list[set[int]]:
        views = []
        for _ in range(2):
            [disk] = make(tmp_path, [64])
            worker = TieredWorker(NUM_BLOCKS, disk)
            feed, known = CacheFeed(worker.cache.held), CachedBlocks()
            feed.restart()
            async with worker.running():
                tell(feed, known)
                views.append(set(known.keys))
                await worker.ask("a", prompt(1, 8))
                tell(feed, known)
                views.append(set(known.keys))
        return views

    views = asyncio.run(run())
    assert [len(view) for view in views] == [0, 8, 8, 8]
    assert all(a == b for a, b in pairwise(views[1:]))


def test_a_damaged_block_is_held_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        [disk] = make(tmp_path, [64])
        worker = TieredWorker(NUM_BLOCKS, disk)
        feed, known = CacheFeed(worker.cache.held), CachedBlocks()
        async with worker.running():
            await worker.ask("a", prompt(1, 8))
            worker.pool.release(worker.pool.allocate(NUM_BLOCKS) or [])
            (tmp_path / "blocks").write_bytes(bytes(disk.slots.num_slots * ROW_BYTES))
            sequence = worker.sequence("b", prompt(1, 8))
            assert worker.pool.reserve(sequence, sequence.num_tokens)
            assert worker.cache.loadable(sequence) == 1  # to learn how fast it goes
            told: list[int] = []
            worker.cache.load(sequence, 8, told.append)
            await worker.settle(sequence)
            assert (told, worker.cache.num_missed) == ([0], 8)
            worker.pool.release_sequence(sequence)
            tell(feed, known)
            assert known.keys == held(worker, [disk])
            assert len(known.keys) == 7  # the first is known to be damaged

    asyncio.run(run())
