"""The decode half of a simulated worker, in two grades of detail behind one small protocol.

``ScheduledDecode`` drives the real ``DecodeScheduler``, step by step and token by token.
``LeapingDecode`` runs the batch as far as nothing changes in one leap: between two arrivals or
ends a batch only gets longer contexts, so its time has a closed form. It reserves a sequence's
final length at once where the real scheduler grows, and preempts, as it goes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from decode.scheduler import DecodeScheduler
from engine.block_pool import BlockPool
from planner.job import Job
from planner.outcome import Histogram
from planner.placement import Placement


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """The next step's decode work, in the words of ``planner.latency``.

    The same batch may run ``max_steps`` times, its context growing by ``batch`` each time.
    ``tokens`` and ``squares`` are recomputed prompts.
    """

    batch: int = 0
    context: int = 0
    tokens: int = 0
    squares: int = 0
    max_steps: int = 1


class Decode(Protocol):
    """What a worker asks of its decode half."""

    pool: BlockPool

    def reserve(self, job: Job) -> bool:
        """Give ``job.kv`` blocks for a hand-off to come; False when there is no room now."""

    def add(self, job: Job) -> None:
        """``job.kv`` holds its prompt's KV and its first token: it may run."""

    def begin(self) -> DecodeWork:
        """The work of the next step."""

    def end(self, steps: int, started: float, now: float) -> list[Job]:
        """The work ran ``steps`` times. Returns the jobs that ended, their blocks freed."""


class ScheduledDecode:
    """The real scheduler."""

    def __init__(self, pool: BlockPool, placement: Placement, itl: Histogram) -> None:
        self.pool = pool
        self._scheduler = DecodeScheduler(
            pool,
            max_num_seqs=placement.max_num_seqs,
            max_num_batched_tokens=placement.max_num_batched_tokens,
        )
        self._itl = itl
        self._jobs: dict[str, Job] = {}
        self._num_sampling = 0

    def reserve(self, job: Job) -> bool:
        """See ``Decode``; the rule is ``decode.admission``'s."""
        headroom = self._scheduler.headroom
        if headroom is None:
            return False
        return self.pool.reserve(job.kv, job.kv.num_tokens, headroom)

    def add(self, job: Job) -> None:
        """See ``Decode``."""
        self._jobs[job.kv.request_id] = job
        self._scheduler.add(job.kv)

    def begin(self) -> DecodeWork:
        """See ``Decode``."""
        rows = self._scheduler.schedule().rows
        batch = context = tokens = squares = 0
        for row in rows:
            if row.num_tokens == 1:
                batch += 1
                context += row.end
            else:
                tokens += row.num_tokens
                squares += row.end**2 - row.start**2
        self._num_sampling = sum(row.samples for row in rows)
        return DecodeWork(batch, context, tokens, squares)

    def end(self, steps: int, started: float, now: float) -> list[Job]:
        """See ``Decode``; one step at a time."""
        ended = []
        for new in self._scheduler.commit([0] * self._num_sampling):
            job = self._jobs[new.sequence.request_id]
            self._itl.add(now - job.last_token)
            job.last_token = now
            if new.finish_reason is not None:
                ended.append(self._jobs.pop(new.sequence.request_id))
        return ended


class LeapingDecode:
    """Whole runs of steps at once."""

    def __init__(self, pool: BlockPool, placement: Placement, itl: Histogram) -> None:
        self.pool = pool
        self._max_num_seqs = placement.max_num_seqs
        self._itl = itl
        self._waiting: deque[Job] = deque()
        self._newcomers: list[Job] = []  # in their first step
        self._running: list[tuple[int, int, Job]] = []  # a heap: the step that ends each
        self._step = 0
        self._context = 0

    def reserve(self, job: Job) -> bool:
        """See ``Decode``."""
        pool, final = self.pool, job.request.num_tokens
        room = pool.blocks_for(final) - pool.blocks_for(job.kv.num_tokens)
        return pool.reserve(job.kv, job.kv.num_tokens, room) and pool.grow(job.kv, final)

    def add(self, job: Job) -> None:
        """See ``Decode``. A colocated sequence grows to its final length if it can."""
        self.pool.grow(job.kv, job.request.num_tokens)
        self._waiting.append(job)

    def begin(self) -> DecodeWork:
        """See ``Decode``."""
        self._newcomers.clear()
        while self._waiting and len(self._running) < self._max_num_seqs:
            job = self._waiting.popleft()
            last_step = self._step + job.request.output_tokens - 1
            heappush(self._running, (last_step, job.number, job))
            self._newcomers.append(job)
            self._context += job.request.prompt_tokens + 1
        if not self._running:
            return DecodeWork()
        max_steps = 1 if self._newcomers else self._running[0][0] - self._step
        return DecodeWork(len(self._running), self._context, max_steps=max_steps)

    def end(self, steps: int, started: float, now: float) -> list[Job]:
        """See ``Decode``."""
        batch = len(self._running)
        if not batch:
            return []
        for job in self._newcomers:
            self._itl.add(now - job.first_token)
        others = steps * batch - len(self._newcomers)
        if others:
            self._itl.add((now - started) / steps, others)
        self._step += steps
        self._context += steps * batch
        ended = []
        while self._running and self._running[0][0] == self._step:
            job = heappop(self._running)[2]
            self._context -= job.request.num_tokens
            job.last_token = now
            self.pool.release_sequence(job.kv)
            ended.append(job)
        return ended
