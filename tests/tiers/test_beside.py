"""Blocks that a tier brings back beside a hand-off: whose they are meanwhile, and how many."""

from __future__ import annotations

import asyncio

import pytest

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from engine.tiers import cache as cache_module
from tests.fake_model import kv_of
from tests.tiers.worker import BLOCK_SIZE, LONG, GatedTier, TieredWorker, prompt, spilled


async def beside(worker: TieredWorker, blocks: int = LONG) -> tuple[Sequence, list[int]]:
    """A sequence that somebody else computes, whose blocks the tier begins to bring back."""
    sequence = worker.sequence("handed off", prompt(1))
    assert worker.pool.reserve(sequence, sequence.num_tokens)
    assert sequence.num_computed == 0
    told: list[int] = []
    worker.cache.load(sequence, blocks, told.append)
    await asyncio.sleep(0)
    return sequence, told


def empty(pool: BlockPool) -> None:
    """Evict everything from it."""
    pool.release(pool.allocate(pool.num_blocks) or [])


def test_a_hand_offs_blocks_are_filled_beside_it() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            empty(worker.pool)
            tier.may_load.clear()
            sequence, told = await beside(worker)
            assert told == []
            twin = worker.sequence("twin", prompt(1))
            worker.pool.extend_hashes(twin)
            assert worker.cache.loadable(twin) == 0  # what is on its way is not loaded twice
            tier.may_load.set()
            await worker.settle(sequence)
            assert told == [LONG]
            sequence.num_computed = LONG * BLOCK_SIZE
            expected = kv_of(sequence.token_ids)[: LONG * BLOCK_SIZE]
            assert worker.memory.rows[sequence.block_table[:LONG]].flatten().tolist() == expected
            found = [worker.pool.find(name) for name in sequence.block_hashes]
            assert found == sequence.block_table[:LONG]
            worker.pool.release_sequence(sequence)

    asyncio.run(run())


def test_blocks_that_are_given_up_meanwhile_are_nobody_elses_before_the_load_has_ended() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            empty(worker.pool)
            tier.may_load.clear()
            sequence, told = await beside(worker)
            worker.pool.release_sequence(sequence)
            assert worker.pool.allocate(12 - LONG + 1) is None
            worker.check()
            tier.may_load.set()
            await worker.settle()
            assert told == [LONG]
            assert worker.pool.num_used == 0
            assert await worker.ask("3", prompt(1)) == LONG * BLOCK_SIZE

    asyncio.run(run())


def test_no_more_is_loaded_beside_a_hand_off_than_comes_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(24, tier)  # a window of 3
        async with worker.running():
            await spilled(worker)
            empty(worker.pool)
            sequence = worker.sequence("handed off", prompt(1))
            worker.pool.extend_hashes(sequence)
            assert worker.cache.loadable(sequence) == 3  # to learn how fast it goes
            assert await worker.ask("4", prompt(2)) == LONG * BLOCK_SIZE
            monkeypatch.setattr(cache_module, "BESIDE", 1e6)
            assert worker.cache.loadable(sequence) == LONG
            monkeypatch.setattr(cache_module, "BESIDE", 1e-9)
            assert worker.cache.loadable(sequence) == 0
            monkeypatch.setattr(cache_module, "RETRY", 0.0)  # what it measured is too old
            assert worker.cache.loadable(sequence) == 3

    asyncio.run(run())


def test_a_hand_off_is_told_how_far_the_tier_came() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            empty(worker.pool)
            sequence = worker.sequence("handed off", prompt(1))
            worker.pool.extend_hashes(sequence)
            tier.drop(sequence.block_hashes[4])
            sequence, told = await beside(worker)
            await worker.settle(sequence)
            assert told == [4]
            assert worker.cache.num_missed == LONG - 4
            worker.pool.release_sequence(sequence)

    asyncio.run(run())


@pytest.mark.parametrize("slow", ["may_store", "may_load"])
def test_nothing_is_promised_while_the_tier_is_held_up(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(24, tier)
        async with worker.running():
            await spilled(worker)
            empty(worker.pool)
            sequence = worker.sequence("handed off", prompt(1))
            worker.pool.extend_hashes(sequence)
            assert worker.cache.loadable(sequence) == 3
            monkeypatch.setattr(cache_module, "BESIDE", 0.01)
            getattr(tier, slow).clear()
            worker.add("waits", prompt(3 if slow == "may_store" else 2))
            while worker.step():
                pass
            await asyncio.sleep(0.05)
            assert worker.cache.loadable(sequence) == 0
            getattr(tier, slow).set()
            await worker.finish("waits")
            await worker.settle()
            monkeypatch.setattr(cache_module, "RETRY", 0.0)  # it was slow; that is too old
            assert worker.cache.loadable(sequence) == 3

    asyncio.run(run())
