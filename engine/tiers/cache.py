"""A block pool's prefix cache, continued in slower memory.

    computed ──> pool ──save, in the background──> tier (host memory, disk)
    received ──>  ^                                 │
                  └── bring back, before a prompt's ┘
                      first chunk or beside a hand-off

Every block that gets a name is saved in the order of the names, as fast as the tier takes it: the
queue is the pool itself, and what the pool gives up unsaved is lost to the tier, never waited for.
A prompt whose prefix goes on in the tier waits until its blocks are back, if that is predicted to
be faster than computing them; others start meanwhile. What a worker need not compute, since it is
handed the prompt's blocks, it brings back beside the transfer of the others.

All of this is the event loop's; only copying happens on a thread of its own. Whatever is being
copied has a reference here, so that nobody else writes to it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from typing import TypeVar
from weakref import WeakSet

from engine.block_pool import BlockPool
from engine.rate import Rate
from engine.sequence import Sequence as Prompt
from engine.tiers.copier import BlockCopier
from engine.tiers.held import HeldBlocks
from engine.tiers.tier import Tier

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a prompt waits for its blocks at most; then it is computed
RETRY = 30.0  # seconds after which a rate that speaks against loading is measured again
BESIDE = 0.25  # seconds that bringing back a hand-off's blocks may be predicted to take

Copied = TypeVar("Copied")
Run = list[tuple[bytes, int | None]]  # the hashes of a prefix, each with its block in the pool


class TieredCache:
    """Saves and restores ``pool``'s blocks, each of ``row_bytes``. ``tiers``: the fastest first."""

    def __init__(
        self, pool: BlockPool, copier: BlockCopier, tiers: Sequence[Tier], row_bytes: int
    ) -> None:
        self.held = HeldBlocks(pool, tiers)
        self._pool = pool
        self._copier = copier
        self._tiers = tiers
        self._tier = tiers[0]  # which knows those below it
        self._row_bytes = row_bytes
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-tier")
        self._tasks = asyncio.TaskGroup()
        self._unsaved: dict[bytes, int] = {}  # named blocks that the tier lacks, oldest first
        self._to_save = asyncio.Event()
        self._copying: list[list[int]] = []  # blocks, each with a reference
        self._waiting: set[Prompt] = set()  # for their blocks
        self._decided: WeakSet[Prompt] = WeakSet()  # that wait no more
        self._restoring: set[bytes] = set()
        self._num_late = 0  # restores that take longer than ``PATIENCE``
        self._began = math.inf  # the copy that is under way; later than now: none is
        self._load_rate = Rate()  # bytes
        self._load_measured = -math.inf  # when
        self.save_seconds = 0.0
        self.load_seconds = 0.0
        self.num_lost = 0  # blocks that the pool gave up before they were saved
        self.num_restored = 0  # blocks that came back whole
        self.num_missed = 0  # blocks that hand-offs counted on and that did not
        self.num_failed = 0  # blocks whose copies raised
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
        return bool(self._copying or self._unsaved)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists that are being copied, for ``BlockPool.check_integrity``."""
        return self._copying

    def stored(self, block_hash: bytes, block: int) -> None:
        """The pool finds a block by its hash from now on."""
        if self._tier.writable and block_hash not in self._tier:
            self._unsaved[block_hash] = block
            self._to_save.set()

    def evicted(self, block_hash: bytes) -> None:
        """The pool finds the block no more: it is about to be overwritten."""
        if self._unsaved.pop(block_hash, None) is not None:
            self.num_lost += 1

    def ready(self, prompt: Prompt, tokens_per_second: float, headroom: int = 0) -> bool:
        """Whether a prompt should start; False while more of its prefix is being brought back.

        ``tokens_per_second`` is how fast prompts are computed, 0 if that is not known. Restoring
        leaves ``headroom`` blocks of the pool free. A prompt waits for one restore of its own: what
        is gone again after it is computed.
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
        has_room = len(missing) + headroom <= self._pool.num_free
        fresh = self._pool.allocate(len(missing)) if has_room else None
        if fresh is None:  # nor is there room for the prompt
            self._pool.release(found)
            return True
        unused = iter(fresh)
        blocks = [next(unused) if block is None else block for _, block in run]
        self._copying.append(blocks)
        self._decided.add(prompt)
        self._waiting.add(prompt)
        self._restoring.update(missing)
        self._tasks.create_task(self._restore(prompt, blocks, missing, fresh))
        return False

    def loadable(self, sequence: Prompt) -> int:
        """How many blocks after a sequence's computed ones ``load`` should bring back.

        They go on with its prefix, and are predicted to be there within ``BESIDE`` seconds. None
        while the thread is held up by a copy that takes longer than that.
        """
        if time.monotonic() - self._began > BESIDE:
            return 0
        first = sequence.num_computed // self._pool.block_size
        hashes = islice(sequence.block_hashes, first, first + self._loadable_in_time())
        there = takewhile(lambda h: h in self._tier and h not in self._restoring, hashes)
        return sum(1 for _ in there)

    def load(self, sequence: Prompt, count: int, done: Callable[[int], None]) -> None:
        """Fill ``count`` blocks after a sequence's computed ones.

        ``done`` is told how many of them, from the first on, are as they were saved. They belong to
        the sequence, which may give them up meanwhile.
        """
        first = sequence.num_computed // self._pool.block_size
        blocks = sequence.block_table[first : first + count]
        hashes = sequence.block_hashes[first : first + count]
        self._pool.hold(blocks)
        self._copying.append(blocks)
        self._restoring.update(hashes)
        self._tasks.create_task(self._load_beside(sequence, blocks, hashes, done))

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

    def _loadable_in_time(self) -> int:
        """Blocks that are back in ``BESIDE`` seconds; what is unknown is tried with a window."""
        at_once = int(self._blocks_per_second * BESIDE) - len(self._restoring)
        return max(at_once, self._copier.window if self._unmeasured else 0)

    def _worthwhile(self, run: Run, num_missing: int, tokens_per_second: float) -> bool:
        """Whether loading is faster than computing, by their rates; what is unknown is tried."""
        if self._unmeasured or not tokens_per_second:
            return True
        loading = (num_missing + len(self._restoring)) / self._blocks_per_second
        first = next(index for index, (_, block) in enumerate(run) if block is None)
        computing = (len(run) - first) * self._pool.block_size / tokens_per_second
        return loading < computing

    @property
    def _blocks_per_second(self) -> float:
        return self._load_rate.per_second / self._row_bytes

    @property
    def _unmeasured(self) -> bool:
        """Whether nobody knows how fast blocks come back now."""
        outdated = time.monotonic() - self._load_measured > RETRY
        return outdated or not self._blocks_per_second

    async def _restore(
        self, prompt: Prompt, blocks: list[int], missing: list[bytes], fresh: list[int]
    ) -> int:
        """Fill ``fresh``, which are among the copied ``blocks`` of a prefix; how many are whole."""
        load = self._tasks.create_task(self._copy(self._copier.load, missing, fresh))
        _, late = await asyncio.wait({load}, timeout=PATIENCE)
        if late:  # the prompt is computed; its blocks are the thread's until that has ended
            self._num_late += 1
            self._waiting.discard(prompt)
            self.on_change()
        loaded, seconds = await load
        good = loaded or 0
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
        return good

    async def _load_beside(
        self,
        sequence: Prompt,
        blocks: list[int],
        hashes: list[bytes],
        done: Callable[[int], None],
    ) -> None:
        good = await self._restore(sequence, blocks, hashes, blocks)
        self.num_missed += len(blocks) - good
        done(good)

    async def _save(self) -> None:
        hashes = list(islice(self._unsaved, self._copier.window))
        blocks = [self._unsaved.pop(block_hash) for block_hash in hashes]
        if not self._unsaved:
            self._to_save.clear()
        self._pool.hold(blocks)
        self._copying.append(blocks)
        _, seconds = await self._copy(self._copier.store, hashes, blocks)
        self.save_seconds += seconds
        self._give_back(blocks)

    def _give_back(self, blocks: list[int]) -> None:
        self._copying.remove(blocks)
        self._pool.release(blocks)
        self.on_change()

    async def _copy(
        self,
        copy: Callable[[Sequence[bytes], Sequence[int]], Copied],
        hashes: Sequence[bytes],
        blocks: Sequence[int],
    ) -> tuple[Copied | None, float]:
        """Copy on the thread; the result, None where it raised, and how many seconds it took."""

        def on_the_thread() -> tuple[Copied | None, float, list[bytes]]:
            self._began = began = time.monotonic()
            copied = None
            try:
                copied = copy(hashes, blocks)
            except Exception:  # whatever it is, a cache lacks some blocks and the worker goes on
                if self.num_failed == 0:
                    log.exception("a copy between the KV pool and a tier failed; more are counted")
                self.num_failed += len(blocks)
            self._began = math.inf
            left = [h for tier in self._tiers for h in tier.slots.take_left()]
            return copied, time.monotonic() - began, left

        loop = asyncio.get_running_loop()
        copied, seconds, left = await loop.run_in_executor(self._executor, on_the_thread)
        self.held.left(left)
        return copied, seconds
