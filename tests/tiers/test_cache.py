"""The prefix cache continued in a tier: what comes back is right, and nobody waits for it in vain.

``TieredWorker`` checks every first token, and who owns each block before and after every step.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tiers import cache as cache_module
from engine.tiers.disk import DiskTier
from engine.tiers.host import HostTier
from tests.tiers.worker import (
    BLOCK_SIZE,
    LONG,
    ROW_BYTES,
    GatedTier,
    TieredWorker,
    prompt,
    spilled,
)


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=4, max_size=14),
    slots=st.integers(1, 40),
    num_blocks=st.integers(10, 24),
    at_once=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_first_tokens_are_those_of_a_pool_without_tiers(
    turns: list[tuple[int, int]], slots: int, num_blocks: int, at_once: int, seed: int
) -> None:
    async def run() -> None:
        tier = HostTier(slots * ROW_BYTES, ROW_BYTES)
        worker = TieredWorker(num_blocks, tier)
        random = Random(seed)
        async with worker.running():
            for start in range(0, len(turns), at_once):
                names = []
                for index, (first, blocks) in enumerate(turns[start : start + at_once], start):
                    names.append(str(index))
                    worker.add(names[-1], prompt(first, blocks))
                if random.random() < 0.3:
                    worker.scheduler.cancel(names.pop())
                await worker.finish(*names)
                if random.random() < 0.5:
                    await worker.settle()
                assert len(tier.slots) <= slots
            await worker.settle()
        assert worker.pool.num_used == 0

    asyncio.run(run())


def test_an_evicted_prefix_comes_back_and_counts_as_cached() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            assert await worker.ask("3", prompt(1)) == LONG * BLOCK_SIZE
            assert worker.cache.num_restored == len(tier.loads) > 0
            loaded = len(tier.loads)
            assert await worker.ask("4", prompt(1)) == LONG * BLOCK_SIZE
            assert len(tier.loads) == loaded  # it is in the pool now

    asyncio.run(run())


def test_the_disk_tier_serves_the_next_worker_and_no_other_model(tmp_path: Path) -> None:
    async def run() -> None:
        for salt, cached in ((b"a", 0), (b"a", LONG * BLOCK_SIZE), (b"b", 0)):
            disk = DiskTier(tmp_path, 64 * ROW_BYTES, ROW_BYTES, salt)
            worker = TieredWorker(30, disk, salt=salt)
            async with worker.running():
                assert await worker.ask("1", prompt(1)) == cached

    asyncio.run(run())


def test_what_the_host_gives_up_goes_to_the_disk(tmp_path: Path) -> None:
    async def run() -> None:
        disk = DiskTier(tmp_path, 64 * ROW_BYTES, ROW_BYTES, b"")
        host = HostTier(4 * ROW_BYTES, ROW_BYTES, disk)
        worker = TieredWorker(12, host, disk)
        async with worker.running():
            await spilled(worker)
            assert len(host.slots) == 4
            assert len(disk.slots) == 2 * LONG - 4
            assert await worker.ask("3", prompt(1)) == LONG * BLOCK_SIZE
            assert disk.counters.loaded > 0

    asyncio.run(run())


def test_others_start_while_a_prompt_waits_for_its_blocks() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(30, tier)
        async with worker.running():
            await spilled(worker)
            assert await worker.ask("3", prompt(3)) == 0  # evicts the first one
            tier.may_load.clear()
            held = worker.add("held", prompt(1))
            twin = worker.add("twin", prompt(1))
            worker.add("other", [5] * BLOCK_SIZE)
            await worker.finish("other")
            assert not worker.step()
            assert list(worker.scheduler.waiting) == [held, twin]
            tier.may_load.set()
            await worker.finish("held", "twin")
            assert held.num_cached == twin.num_cached == LONG * BLOCK_SIZE
            assert len(tier.loads) == len(set(tier.loads))  # the twin's came with it

    asyncio.run(run())


def test_a_prompt_does_not_wait_for_a_tier_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE", 0.05)

    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(40, tier)
        async with worker.running():
            await worker.ask("1", prompt(1))
            worker.pool.release(worker.pool.allocate(40) or [])  # forgets all names
            tier.may_load.clear()
            first = worker.add("first", prompt(1))
            await worker.finish("first")
            assert first.num_cached == 0
            twin = worker.add("twin", prompt(1, LONG + 1))  # nor does anybody after it
            await worker.finish("twin")
            assert twin.num_cached == LONG * BLOCK_SIZE
            assert worker.cache.owned_blocks()  # the thread may still write there
            tier.may_load.set()
            await worker.settle()
            assert worker.pool.num_used == 0

    asyncio.run(run())


def test_steps_do_not_wait_for_a_tier_that_does_not_store() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(24, tier)
        async with worker.running():
            tier.may_store.clear()
            for number in range(6):
                worker.add(str(number), prompt(number))
                await worker.finish(str(number))
            assert len(tier.slots) == 0
            assert worker.cache.num_lost > 0
            assert sum(map(len, worker.cache.owned_blocks())) <= 24 // 8  # one window
            tier.may_store.set()
            await worker.settle()
            assert len(tier.slots) + worker.cache.num_lost == 6 * LONG

    asyncio.run(run())


def test_a_damaged_block_is_computed_again() -> None:
    async def run() -> None:
        tier = HostTier(64 * ROW_BYTES, ROW_BYTES)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            sequence = worker.add("3", prompt(1))
            worker.pool.extend_hashes(sequence)
            slot = tier.slots.find(sequence.block_hashes[6])
            tier._rows[slot, 3] ^= 4
            await worker.finish("3")
            assert sequence.num_cached == 6 * BLOCK_SIZE
            assert tier.counters.refused == {"damaged": 1}
            await worker.settle()
            assert sequence.block_hashes[6] in tier  # stored anew

    asyncio.run(run())


def test_copies_that_raise_cost_what_they_would_have_copied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            tier.error = RuntimeError("out of order")
            assert await worker.ask("3", prompt(1)) == 0  # is not brought back
            assert await worker.ask("4", prompt(3)) == 0  # is not saved
            tier.error = None
            assert await worker.ask("5", prompt(1)) == LONG * BLOCK_SIZE
            assert await worker.ask("6", prompt(3)) == 0
            assert worker.cache.num_failed == 2 * LONG - 1  # the pool had one left of prompt 1

    asyncio.run(run())
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        "out of order"
    ]


def test_what_is_faster_to_compute_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            assert await worker.ask("3", prompt(1)) > 0  # measures how fast it loads
            worker.tokens_per_second = 1e12
            assert await worker.ask("4", prompt(2)) == 0
            assert worker.cache.num_slow > 0
            worker.tokens_per_second = 1e-3
            assert await worker.ask("5", prompt(1)) == LONG * BLOCK_SIZE
            worker.tokens_per_second = 1e12
            monkeypatch.setattr(cache_module, "RETRY", 0.0)  # what it measured is too old
            assert await worker.ask("6", prompt(2)) == LONG * BLOCK_SIZE

    asyncio.run(run())


def test_a_cancelled_prompts_blocks_still_arrive() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            tier.may_load.clear()
            worker.add("3", prompt(1))
            assert not worker.step()
            worker.scheduler.cancel("3")
            tier.may_load.set()
            await worker.settle()
            tier.may_load.clear()
            worker.add("4", prompt(1))
            assert worker.step()

    asyncio.run(run())


def test_restoring_leaves_others_the_room_they_need() -> None:
    async def run() -> None:
        tier = GatedTier(64)
        worker = TieredWorker(12, tier)
        async with worker.running():
            await spilled(worker)
            worker.pool.release(worker.pool.allocate(12) or [])  # forgets all names
            waiting = worker.sequence("3", prompt(1))
            assert worker.cache.ready(waiting, 0.0, headroom=12 - LONG + 1)
            assert not worker.cache.owned_blocks()
            assert not worker.cache.ready(waiting, 0.0, headroom=12 - LONG)
            await worker.settle()

    asyncio.run(run())
