"""A discrete-event simulation of a placement under a workload, on virtual time.

    arrival → route → overhead → prefill queue → chunks → first token
            → transfer → decode batch → last token

Without a transfer where one worker does both: a colocated one, or decode with a short prompt.
Chunks are the real prefill scheduler's, over real block pools with their prefix caches. In detail
``exact`` decode steps are the real decode scheduler's and routing is the router's; in detail
``fast`` both follow the same rules in aggregate (``planner.decoding``, ``planner.routing``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import Literal

from engine.block_pool import BlockPool
from planner.clock import Clock
from planner.decoding import LeapingDecode, ScheduledDecode
from planner.job import Job, new_job, warm
from planner.outcome import Outcome
from planner.pace import Pace
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.routing import LeastLoaded, Route, RouterPolicy, Workers
from planner.worker import SimulatedWorker
from planner.workload import Request
from prefill.scheduler import PrefillScheduler
from protocol.errors import ConfigError

LOOK_EVERY = 16  # ends between two looks at whether to go on

Detail = Literal["exact", "fast"]


def simulate(
    requests: Iterable[Request],
    placement: Placement,
    profile: WorkerProfile,
    *,
    detail: Detail = "fast",
    route: Callable[[Placement, WorkerProfile], Route] | None = None,
    elastic: bool = False,
    give_up: Callable[[Outcome], bool] = lambda _: False,
) -> Outcome:
    """Run every request to its end, or until ``give_up`` is true of the outcome so far.

    ``requests`` come in order of arrival and are read one at a time. ``route`` replaces the
    router's policy; with ``elastic`` every worker can serve in both roles, all of them are
    numbered as one, and the route says who serves in which. Raises ConfigError when a worker's KV
    does not hold a single block.
    """
    if profile.kv_tokens < placement.block_size:
        raise ConfigError(f"{profile.kv_tokens} tokens of KV do not hold one block")
    if route is None:
        route = RouterPolicy if detail == "exact" and not placement.colocated else LeastLoaded
    chosen = route(placement, profile)
    return _Simulation(placement, profile, detail, chosen, elastic, give_up).run(requests)


class _Simulation:
    """The workers of one placement and what passes between them."""

    def __init__(
        self,
        placement: Placement,
        profile: WorkerProfile,
        detail: Detail,
        route: Route,
        elastic: bool,
        give_up: Callable[[Outcome], bool],
    ) -> None:
        self._give_up = give_up
        self._placement = placement
        self._profile = profile
        self._route = route
        self._clock = Clock()
        self._outcome = Outcome()
        self._numbers = count()
        self._unplaced: deque[Job] = deque()  # wait in the router
        self._where: dict[int, Workers] = {}
        make = ScheduledDecode if detail == "exact" else LeapingDecode
        seeds = count()

        def worker(*, prefill: bool, decode: bool) -> SimulatedWorker:
            pool = BlockPool(profile.kv_tokens // placement.block_size, placement.block_size)
            return SimulatedWorker(
                self._clock,
                profile.latency,
                placement,
                Pace(profile.latency, seed=next(seeds)),
                prefill=_prefill_scheduler(pool, placement) if prefill else None,
                decode=make(pool, placement, self._outcome.itl) if decode else None,
                offer=self._offer,
                prefilled=self._prefilled,
                ended=self._ended,
            )

        if elastic:
            num_workers = placement.num_workers
            self._decode = [worker(prefill=True, decode=True) for _ in range(num_workers)]
            self._prefill = self._decode
        else:
            self._prefill = [worker(prefill=True, decode=False) for _ in range(placement.prefill)]
            both = bool(placement.colocated or placement.local_prefill_tokens)
            num_decode = placement.decode or placement.colocated
            self._decode = [worker(prefill=both, decode=True) for _ in range(num_decode)]
        pools = [[worker.pool for worker in pool] for pool in (self._prefill, self._decode)]
        route.watch(pools[0], pools[1], self._unplaced)
        self._link_free = [0.0] * len(self._prefill)  # when each prefill worker's link is
        self._pending: list[deque[Job]] = [deque() for _ in self._decode]  # want room in decode

    def run(self, requests: Iterable[Request]) -> Outcome:
        """Everything, to the end or until it is given up."""
        self._clock.run(requests, self._arrive)
        return self._outcome

    def _arrive(self, request: Request) -> None:
        capacity = self._profile.kv_tokens // self._placement.block_size
        needed = -(-request.num_tokens // self._placement.block_size)
        if needed > capacity:
            self._outcome.num_rejected += 1
            return
        number, size = next(self._numbers), self._placement.block_size
        self._unplaced.append(new_job(number, request, size))
        self._place()

    def _place(self) -> None:
        while self._unplaced:
            chosen = self._route.choose(self._unplaced[0], self._clock.now)
            if chosen is None:
                return
            job = self._unplaced.popleft()
            self._where[job.number] = chosen
            if chosen[0] is not None:
                job.hand_off()
            self._clock.at(self._clock.now + self._profile.overhead, partial(self._queue, job))

    def _queue(self, job: Job) -> None:
        worker = self._computing(job)
        assert worker.prefill is not None
        warm(worker.prefill.pool, job)
        worker.add(job)

    def _computing(self, job: Job) -> SimulatedWorker:
        """The worker that has the prompt."""
        prefill, decode = self._where[job.number]
        return self._decode[decode] if prefill is None else self._prefill[prefill]

    def _offer(self, job: Job) -> None:
        prefill, decode = self._where[job.number]
        if prefill is None or job.request.output_tokens == 1:  # no hand-off
            self._computing(job).grant(job)
        else:
            self._pending[decode].append(job)
            self._grant_pending(decode)

    def _grant_pending(self, index: int) -> None:
        """First come, first served, as ``decode.admission`` does."""
        decode, pending = self._decode[index].decode, self._pending[index]
        assert decode is not None
        while pending and decode.reserve(pending[0]):
            job = pending.popleft()
            job.granted = True
            self._computing(job).grant(job)
            if job.last_chunk:  # prefill was ahead
                self._ship(job)

    def _prefilled(self, job: Job, last_chunk: int) -> None:
        job.last_chunk = last_chunk
        self._route.prefilled(job)
        self._outcome.prompt_tokens += job.request.prompt_tokens
        self._outcome.cached_tokens += job.sequence.num_cached
        prefill, decode = self._where[job.number]
        if job.request.output_tokens == 1:
            self._release(job)
            self._ended(job)
        elif prefill is None:
            half = self._decode[decode].decode
            assert half is not None
            half.add(job)
        elif job.granted:
            self._ship(job)
        self._place()

    def _ship(self, job: Job) -> None:
        """Hand over when the KV has arrived: blocks travel one after another from the first
        chunk's end. What decode has cached stays; the last chunk can travel only now.
        """
        prefill, _ = self._where[job.number]
        assert prefill is not None
        link, now = self._profile.link, self._clock.now
        second_per_token = self._profile.kv_bytes_per_token / link.bytes_per_second
        moved = job.request.prompt_tokens - job.kv.num_cached
        began = max(job.first_chunk, self._link_free[prefill])
        sent = max(
            began + moved * second_per_token, now + min(job.last_chunk, moved) * second_per_token
        )
        self._link_free[prefill] = sent
        self._clock.at(sent + link.delay(job.number), lambda: self._hand_over(job))

    def _hand_over(self, job: Job) -> None:
        self._release(job)
        worker = self._decode[self._where[job.number][1]]
        assert worker.decode is not None
        job.kv.num_computed = job.request.prompt_tokens
        worker.decode.pool.publish(job.kv, 0)
        if job.kv.num_tokens == job.request.prompt_tokens:
            job.kv.token_ids.append(0)
        worker.decode.add(job)
        worker.wake()

    def _release(self, job: Job) -> None:
        """The prompt's blocks stay as prefix cache where it was computed."""
        worker = self._computing(job)
        assert worker.prefill is not None
        worker.prefill.pool.release_sequence(job.sequence)
        worker.wake()

    def _ended(self, job: Job) -> None:
        _, decode = self._where.pop(job.number)
        self._route.ended(job)
        others = job.request.output_tokens - 1
        tpot = (job.last_token - job.first_token) / others if others else 0.0
        self._outcome.add(job.first_token - job.request.arrival, tpot)
        if self._outcome.num_requests % LOOK_EVERY == 0 and self._give_up(self._outcome):
            self._clock.stop()
        self._grant_pending(decode)
        self._place()


def _prefill_scheduler(pool: BlockPool, placement: Placement) -> PrefillScheduler:
    return PrefillScheduler(
        pool,
        max_num_batched_tokens=placement.max_num_batched_tokens,
        max_num_seqs=max(1, placement.max_num_seqs // 4),
    )
