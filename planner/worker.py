"""A simulated worker: real schedulers, an engine that only takes time.

A prefill worker has a prefill half, a decode worker a decode half, a colocated worker both over
one block pool: each of its steps carries its decode rows and prompt chunks, by the rule of the
real worker's one scheduler (``engine.token_budget``; chunked prefill, as in Sarathi-Serve, OSDI
'24).
"""

from __future__ import annotations

from collections.abc import Callable

from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.token_budget import prompt_budget
from planner.clock import Clock
from planner.decoding import Decode, DecodeWork
from planner.job import Job
from planner.latency import LinearLatency, TableLatency
from planner.pace import Pace
from planner.placement import Placement
from prefill.scheduler import PrefillScheduler


class SimulatedWorker:
    """Runs steps while there is work. What leaves it goes to ``prefilled`` and ``ended``.

    ``offer`` is asked to reserve room in decode for a prompt that is about to be finished.
    """

    def __init__(
        self,
        clock: Clock,
        latency: LinearLatency | TableLatency,
        placement: Placement,
        pace: Pace,
        *,
        prefill: PrefillScheduler | None = None,
        decode: Decode | None = None,
        offer: Callable[[Job], None],
        prefilled: Callable[[Job, int], None],
        ended: Callable[[Job], None],
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self._clock = clock
        self._latency = latency
        self._pace = pace
        self._budget = placement.max_num_batched_tokens
        self._offer, self._prefilled, self._ended = offer, prefilled, ended
        self._jobs: dict[str, Job] = {}  # in prefill
        self._chunks = Batch(())
        self._work = DecodeWork()
        self._busy = False
        self._started = 0.0
        self._steps = 0  # of the run under way
        self._run = 0  # its number: an end that was put off belongs to a former one

    @property
    def pool(self) -> BlockPool:
        """The blocks of both halves."""
        half = self.prefill or self.decode
        assert half is not None
        return half.pool

    def add(self, job: Job) -> None:
        """Queue a prompt."""
        assert self.prefill is not None
        self._jobs[job.sequence.request_id] = job
        self.prefill.add(job.sequence)
        self.wake()

    def grant(self, job: Job) -> None:
        """Decode has room for the prompt."""
        assert self.prefill is not None
        self.prefill.grant(job.sequence.request_id)
        self.wake()

    def wake(self) -> None:
        """Something may have become possible: begin, or look again after the present step."""
        if not self._busy:
            self._begin()
        elif self._steps > 1:
            self._cut_short()

    def _begin(self) -> None:
        self._busy = True
        self._work = work = DecodeWork() if self.decode is None else self.decode.begin()
        self._chunks = self._next_chunks(work.batch + work.tokens)
        if not (work.batch or work.tokens or self._chunks.rows):
            self._busy = False
            return
        self._started = self._clock.now
        prompts = bool(self._chunks.rows or work.tokens)
        self._steps = self._pace.begin(prompts, 1 if self._chunks.rows else work.max_steps)
        self._end_after(self._steps)

    def _next_chunks(self, taken: int) -> Batch:
        """The prompt chunks of the next step; ``taken`` tokens of it are decode's."""
        if self.prefill is None or not self._jobs:
            return Batch(())
        self.prefill.max_num_batched_tokens = prompt_budget(self._budget, taken)
        batch = self.prefill.schedule()
        offers = [self._jobs[sequence.request_id] for sequence in self.prefill.prompts_to_offer()]
        new_offers = [job for job in offers if not job.asked]
        for job in new_offers:
            job.asked = True
            self._offer(job)
        if batch.rows or not new_offers:
            return batch
        return self.prefill.schedule()  # a grant may have come at once

    def _seconds(self, steps: int) -> float:
        """The time of ``steps`` steps of the present work, by their mean context."""
        tokens, squares = self._work.tokens, self._work.squares
        for row in self._chunks.rows:
            tokens += row.num_tokens
            squares += row.end**2 - row.start**2
        batch = self._work.batch
        context = self._work.context + batch * (steps - 1) / 2
        mean = self._latency.step_seconds(tokens, squares, batch, context)
        return steps * mean * self._pace.factor

    def _cut_short(self) -> None:
        """End the run with the step that is under way at this moment."""
        elapsed = self._clock.now - self._started
        low, high = 1, self._steps  # the fewest steps that take as long
        while low < high:
            middle = (low + high) // 2
            if self._seconds(middle) >= elapsed:
                high = middle
            else:
                low = middle + 1
        if low < self._steps:
            self._steps = low
            self._end_after(low)

    def _end_after(self, steps: int) -> None:
        self._run += 1
        run, end = self._run, max(self._clock.now, self._started + self._seconds(steps))
        self._clock.at(end, lambda: self._end(run))

    def _end(self, run: int) -> None:
        if run != self._run:
            return
        now, steps, self._steps = self._clock.now, self._steps, 0
        self._pace.end(steps)
        if self.decode is not None:
            for job in self.decode.end(steps, self._started, now):
                self._ended(job)
        if self.prefill is not None and self._chunks.rows:
            self._commit(self.prefill, now)
        self._begin()

    def _commit(self, prefill: PrefillScheduler, now: float) -> None:
        rows = {row.sequence.request_id: row.num_tokens for row in self._chunks.rows}
        for sequence, token_id in prefill.commit([0] * len(self._chunks.sampling_rows)):
            job = self._jobs[sequence.request_id]
            if job.first_chunk < 0:
                job.first_chunk = now
            if token_id is not None:
                del self._jobs[sequence.request_id]
                job.first_token = job.last_token = now
                self._prefilled(job, rows[sequence.request_id])
