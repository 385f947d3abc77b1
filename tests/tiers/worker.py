"""A prefill scheduler with tiers below its pool, over a model that can be computed by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import torch

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from engine.tiers.cache import TieredCache
from engine.tiers.copier import BlockCopier
from engine.tiers.host import HostTier
from engine.tiers.tier import Row, Tier
from prefill.scheduler import PrefillScheduler
from protocol.sampling import SamplingParams
from tests.fake_model import Memory, generate

BLOCK_SIZE = 4  # tokens
LONG = 10  # blocks of a long prompt
ROW_BYTES = 8 * BLOCK_SIZE
SAMPLING = SamplingParams(max_tokens=5)
DEADLINE = 120.0  # seconds, generous: the first copy may have to compile its kernel


class GatedTier(HostTier):
    """Loads and stores only while the gates are open, and raises ``error`` if there is one."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots * ROW_BYTES, ROW_BYTES)
        self.may_load, self.may_store = threading.Event(), threading.Event()
        self.may_load.set()
        self.may_store.set()
        self.loads: list[bytes] = []
        self.error: Exception | None = None

    def store(self, block_hash: bytes, digest: int, row: Row) -> bool:
        assert self.may_store.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        return super().store(block_hash, digest, row)

    def load(self, block_hash: bytes, row: Row) -> int | None:
        assert self.may_load.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        self.loads.append(block_hash)
        return super().load(block_hash, row)


class TieredWorker:
    """Steps are made by ``step``; finished prompts give their blocks back at once.

    ``tiers``: the fastest first.
    """

    def __init__(self, num_blocks: int, *tiers: Tier, salt: bytes = b"") -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, salt)
        self.memory = Memory(num_blocks, BLOCK_SIZE)
        self.cache = TieredCache(
            self.pool, BlockCopier(torch.from_numpy(self.memory.rows), tiers[0]), tiers, ROW_BYTES
        )
        self.scheduler = PrefillScheduler(
            self.pool, max_num_batched_tokens=8, max_num_seqs=4, ask_ahead=4
        )
        self.tokens_per_second = 0.0
        self.scheduler.may_start = lambda p: self.cache.ready(p, self.tokens_per_second)
        self.changed = asyncio.Event()
        self.cache.on_change = self.changed.set
        self.finished: dict[str, Sequence] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        saving = asyncio.create_task(self.cache.run())
        await asyncio.sleep(0)  # it has begun
        try:
            yield
        finally:
            saving.cancel()
            with suppress(asyncio.CancelledError):
                await saving
            self.cache.close()

    def sequence(self, name: str, prompt: list[int]) -> Sequence:
        return Sequence(name, list(prompt), len(prompt), SAMPLING)

    def add(self, name: str, prompt: list[int]) -> Sequence:
        sequence = self.sequence(name, prompt)
        self.scheduler.add(sequence)
        self.scheduler.grant(name)
        return sequence

    def step(self) -> bool:
        """Whether anything could run."""
        self.changed.clear()
        batch = self.scheduler.schedule()
        self.check()
        for sequence, token_id in self.scheduler.commit(self.memory.run(batch)):
            if token_id is not None:
                self.finished[sequence.request_id] = sequence
                prompt = sequence.token_ids[:-1]
                assert token_id == generate(prompt, SAMPLING)[0], "KV of something else was read"
                self.pool.release_sequence(sequence)
        self.check()
        return bool(batch.rows)

    async def finish(self, *names: str) -> None:
        """Step until these prompts have their first tokens."""
        async with asyncio.timeout(DEADLINE):
            while not self.finished.keys() >= set(names):
                if not self.step():
                    await self.changed.wait()
                await asyncio.sleep(0)

    async def settle(self, *others: Sequence) -> None:
        """Until nothing is being copied and nothing is left to save. ``others`` hold blocks too."""
        async with asyncio.timeout(DEADLINE):
            while self.cache.busy:
                self.changed.clear()
                await self.changed.wait()
        self.check(*others)

    async def ask(self, name: str, prompt: list[int]) -> int:
        """Compute a prompt alone; how many of its tokens were cached."""
        sequence = self.add(name, prompt)
        await self.finish(name)
        await self.settle()
        return sequence.num_cached

    def check(self, *others: Sequence) -> None:
        owned = [*self.scheduler.owned_blocks(), *self.cache.owned_blocks()]
        self.pool.check_integrity([*owned, *(sequence.block_table for sequence in others)])


def prompt(first: int, blocks: int = LONG) -> list[int]:
    """``blocks`` full blocks and a token, alike for two prompts only if ``first`` is."""
    return [first, *range(100, 100 + blocks * BLOCK_SIZE)]


async def spilled(worker: TieredWorker) -> None:
    """Prompt 1 is in the tier and not in the pool."""
    assert await worker.ask("1", prompt(1)) == 0
    assert await worker.ask("2", prompt(2)) == 0
