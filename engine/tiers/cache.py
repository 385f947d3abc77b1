"""A block pool's prefix cache, continued in slower memory.

    computed ──> pool ──save, in the background──> tier (host memory, disk)
                   ^                                │
                   └──── bring back, before the ────┘
                         prompt's first chunk

Every block that gets a name is saved in the order of the names, as fast as the tier takes it: the
queue is the pool itself, and what the pool gives up unsaved is lost to the tier, never waited for.
A prompt whose prefix goes on in the tier waits until its blocks are back, if that is predicted to
be faster than computing them; others start meanwhile.

All of this is the event loop's; only copying happens on a thread of its own. Whatever is being
copied has a reference here, so that nobody else writes to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from weakref import WeakSet

from engine.block_pool import BlockPool
from engine.rate import Rate
from engine.sequence import Sequence as Prompt
from engine.tiers.copier import BlockCopier
from engine.tiers.tier import Tier

PATIENCE = 5.0  # seconds that a prompt waits for its blocks at most; then it is computed
RETRY = 30.0  # seconds after which a rate that speaks against loading is measured again

Run = list[tuple[bytes, int | None]]  # the hashes of a prefix, each with its block in the pool


class TieredCache:
    """Saves and restores ``pool``'s blocks, each of ``row_bytes``."""

    def __init__(self, pool: BlockPool, copier: BlockCopier, tier: Tier, row_bytes: int) -> None:
        self._pool = pool
        self._copier = copier
        self._tier = tier
        self._row_bytes = row_bytes
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-tier")
        self._tasks = asyncio.TaskGroup()
        self._unsaved: dict[bytes, int] = {}  # named blocks that the tier lacks, oldest first
        self._to_save = asyncio.Event()
        self._held: list[list[int]] = []  # blocks that are being copied
        self._waiting: set[Prompt] = set()  # for their blocks
        self._decided: WeakSet[Prompt] = WeakSet()  # that wait no more
        self._restoring: set[bytes] = set()
        self._num_late = 0  # restores that take longer than ``PATIENCE``
        self._load_rate = Rate()  # bytes
        self._load_measured = 0.0  # when
        self.save_seconds = 0.0
        self.load_seconds = 0.0
        self.num_lost = 0  # blocks that the pool gave up before they were saved
        self.num_restored = 0  # blocks that came back whole
        self.num_slow = 0  # blocks that were not loaded since computing them is faster
        self.on_change: Callable[[], None] = lambda: None  # blocks are free, or a prompt is ready
        pool.listeners.append(self)

    async def run(self) -> None:
        """Save and restore until cancelled."""
        async with self._tasks:
            while True:
                await self._to_save.wait()
                await self._save()

    def close(self) -> None:
        """End the thread after what it is copying, and let go of the tier."""
        self._executor.shutdown()
        self._tier.close()

    @property
    def busy(self) -> bool:
        """Whether anything is being copied, or left to save."""
        return bool(self._held or self._unsaved)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists that are being copied, for ``BlockPool.check_integrity``."""
        return self._held

    def stored(self, block_hash: bytes, block: int) -> None:
        """The pool finds a block by its hash from now on."""
        if self._tier.writable and block_hash not in self._tier:
            self._unsaved[block_hash] = block
            self._to_save.set()

    def evicted(self, block_hash: bytes) -> None:
        """The pool finds the block no more: it is about to be overwritten."""
        if self._unsaved.pop(block_hash, None) is not None:
            self.num_lost += 1

    def ready(self, prompt: Prompt, tokens_per_second: float) -> bool:
        """Whether a prompt should start; False while more of its prefix is being brought back.

        ``tokens_per_second`` is how fast prompts are computed, 0 if that is not known. A prompt
        waits for one restore of its own: what is gone again after it is computed.
        """
        if prompt in self._waiting:
            return False
        if prompt in self._decided or self._num_late:
            return True
        run = self._find(prompt)
        missing = [block_hash for block_hash, block in run if block is None]
        if not missing:
            return True
        if not self._restoring.isdisjoint(missing):
            return False  # another prompt brings them
        if not self._worthwhile(run, len(missing), tokens_per_second):
            self._decided.add(prompt)
            self.num_slow += len(missing)
            return True
        found = [block for _, block in run if block is not None]
        self._pool.hold(found)
        fresh = self._pool.allocate(len(missing))
        if fresh is None:  # nor is there room for the prompt
            self._pool.release(found)
            return True
        unused = iter(fresh)
        blocks = [next(unused) if block is None else block for _, block in run]
        self._held.append(blocks)
        self._decided.add(prompt)
        self._waiting.add(prompt)
        self._restoring.update(missing)
        self._tasks.create_task(self._restore(prompt, blocks, missing, fresh))
        return False

    def _find(self, prompt: Prompt) -> Run:
        """The prompt's prefix, as far as pool and tier have it."""
        self._pool.extend_hashes(prompt)
        run: Run = []
        for block_hash in prompt.block_hashes[: prompt.num_cacheable // self._pool.block_size]:
            block = self._pool.find(block_hash)
            if block is None and block_hash not in self._tier:
                break
            run.append((block_hash, block))
        return run

    def _worthwhile(self, run: Run, num_missing: int, tokens_per_second: float) -> bool:
        """Whether loading is faster than computing, by their rates; what is unknown is tried."""
        load_rate = self._load_rate.per_second
        if not (load_rate and tokens_per_second):
            return True
        if time.monotonic() - self._load_measured > RETRY:
            return True
        loading = (num_missing + len(self._restoring)) * self._row_bytes / load_rate
        first = next(index for index, (_, block) in enumerate(run) if block is None)
        computing = (len(run) - first) * self._pool.block_size / tokens_per_second
        return loading < computing

    async def _restore(
        self, prompt: Prompt, blocks: list[int], missing: list[bytes], fresh: list[int]
    ) -> None:
        """Fill ``fresh``, which are among the held ``blocks`` of the prompt's prefix."""
        loop = asyncio.get_running_loop()
        load = loop.run_in_executor(self._executor, self._load, missing, fresh)
        _, late = await asyncio.wait({load}, timeout=PATIENCE)
        if late:  # the prompt is computed; its blocks are the thread's until that has ended
            self._num_late += 1
            self._waiting.discard(prompt)
            self.on_change()
        good, seconds = await load
        self._num_late -= len(late)
        self.load_seconds += seconds
        self._load_rate.add(good * self._row_bytes, seconds)
        self._load_measured = time.monotonic()
        self.num_restored += good
        for block, block_hash in zip(fresh[:good], missing, strict=False):
            self._pool.name(block, block_hash)
        self._restoring.difference_update(missing)
        self._waiting.discard(prompt)
        self._give_back(blocks)

    async def _save(self) -> None:
        hashes = list(islice(self._unsaved, self._copier.window))
        blocks = [self._unsaved.pop(block_hash) for block_hash in hashes]
        if not self._unsaved:
            self._to_save.clear()
        self._pool.hold(blocks)
        self._held.append(blocks)
        loop = asyncio.get_running_loop()
        self.save_seconds += await loop.run_in_executor(self._executor, self._store, hashes, blocks)
        self._give_back(blocks)

    def _give_back(self, blocks: list[int]) -> None:
        self._held.remove(blocks)
        self._pool.release(blocks)
        self.on_change()

    # On the thread ---------------------------------------------------------------------------

    def _load(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> tuple[int, float]:
        began = time.perf_counter()
        good = self._copier.load(hashes, blocks)
        return good, time.perf_counter() - began

    def _store(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> float:
        began = time.perf_counter()
        self._copier.store(hashes, blocks)
        return time.perf_counter() - began
