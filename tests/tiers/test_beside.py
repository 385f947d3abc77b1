"""Blocks that a tier brings back beside a hand-off: whose they are meanwhile, and how many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

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


@asynccontextmanager
async def spilling(num_blocks: int = 12) -> AsyncIterator[tuple[TieredWorker, GatedTier]]:
    """A worker whose tier holds prompts 1 and 2, and whose pool holds nothing."""
    tier = GatedTier(64)
    worker = TieredWorker(num_blocks, tier)
    async with worker.running():
        await spilled(worker)
        worker.pool.release(worker.pool.allocate(num_blocks) or [])
        yield worker, tier


async def test_a_hand_offs_blocks_are_filled_beside_it() -> None:
    async with spilling() as (worker, tier):
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


async def test_blocks_that_are_given_up_meanwhile_are_nobody_elses_before_the_load_has_ended() -> (
    None
):
    async with spilling() as (worker, tier):
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


async def test_no_more_is_loaded_beside_a_hand_off_than_comes_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with spilling(24) as (worker, _):
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


async def test_a_hand_off_is_told_how_far_the_tier_came() -> None:
    async with spilling() as (worker, tier):
        sequence = worker.sequence("handed off", prompt(1))
        worker.pool.extend_hashes(sequence)
        tier.drop(sequence.block_hashes[4])
        sequence, told = await beside(worker)
        await worker.settle(sequence)
        assert told == [4]
        assert worker.cache.num_missed == LONG - 4
        worker.pool.release_sequence(sequence)


async def test_a_load_that_raises_brings_nothing_and_the_next_one_all() -> None:
    async with spilling() as (worker, tier):
        tier.error = RuntimeError("out of order")
        sequence, told = await beside(worker)
        await worker.settle(sequence)
        assert told == [0]
        assert worker.cache.num_missed == worker.cache.num_failed == LONG
        worker.pool.release_sequence(sequence)
        tier.error = None
        assert await worker.ask("3", prompt(1)) == LONG * BLOCK_SIZE


@pytest.mark.parametrize("slow", ["may_store", "may_load"])
async def test_nothing_is_promised_while_the_tier_is_held_up(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spilling(24) as (worker, tier):
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
