"""Which request starts next, on which workers, and which one is turned away.

    arrival ──room on its workers────────────────────────────────────────> started
       │                                                                   ^    │
       ├──its wait is forecast to be too long, or the router is full: 429  │    │
       └──> queue, in turns by API key ──room──────────────────────────────┘    │
              │                                                                 │
              └──waited too long, or pushed out by a client with less: 429      │
    resumed, before all others  <──the attempt failed or its worker is gone─────┘

Joint: a request starts only when all of its workers have room for it, so that nothing is
computed that decode cannot take. Pure state: the clock is passed in, nothing is sent here.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from protocol.errors import OverloadedError
from protocol.messages import Role
from router.capacity import Demand, queued_tokens, takes_sequence
from router.disaggregation import Disaggregation
from router.fair_queue import FairQueue
from router.forecast import Forecast
from router.generation import QueueState
from router.metrics import QueueMetrics
from router.policy import Pair
from router.registry import Registry
from router.running import Running
from router.shortage import Shortage

MARGIN = 0.8  # share of the bound that a forecast may reach: it errs, and a late 429 is worse
SAME_AGAIN = 0.1  # seconds until a request may return to workers on which it failed


@dataclass(frozen=True, slots=True)
class Start:
    """A request whose turn it is, and where it goes."""

    running: Running
    pair: Pair
    demand: Demand


class Admission:
    """Everything that waits, and what is at work."""

    def __init__(
        self,
        registry: Registry,
        metrics: QueueMetrics,
        disaggregation: Disaggregation,
        *,
        max_queue_time: float,
        max_num_requests: int,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._disaggregation = disaggregation
        self._max_queue_time = max_queue_time
        self._longest_forecast = MARGIN * max_queue_time
        self._max_num_requests = max_num_requests
        self._forecast = Forecast()
        self._shortage = Shortage()
        self._queue: FairQueue[Running] = FairQueue()  # never started
        self._resumed: list[Running] = []  # first come, first served
        self._started: dict[Running, float] = {}  # when

    @property
    def num_waiting(self) -> int:
        """Requests that are not on workers."""
        return len(self._queue) + len(self._resumed)

    def waiting(self) -> list[Running]:
        """Requests that are not on workers."""
        return [*self._resumed, *self._queue.items()]

    def queue(self, now: float) -> QueueState:
        """What waits, and how long one would that comes now, behind all others."""
        waiting = self.waiting()
        forecast = self._forecast_wait(waiting, has_place="decode" not in self._shortage.pools)
        return QueueState(
            [(now - r.request.timeline.received, r.num_tokens) for r in waiting],
            sorted(self._shortage.pools),
            max([forecast, *(now - r.waiting_since for r in waiting)]),
        )

    def arrive(self, running: Running) -> Running | None:
        """Queue a new request; its turn may be at once. Returns one that it pushes out.

        Raises OverloadedError when it cannot start in time, UnavailableError without workers.
        """
        self._disaggregation.check(self._registry)
        request, demand = running.request, self._demand(running)
        has_room = self._disaggregation.choose(self._registry, demand) is not None
        must_wait = self.num_waiting > 0 or not has_room
        if must_wait and self._wait(running) > self._longest_forecast:
            raise self.overloaded("forecast", running)
        pushed_out = None
        if self.num_waiting + len(self._started) >= self._max_num_requests:
            pushed_out = self._queue.last_behind(request.client, request.priority)
            if pushed_out is None:
                raise self.overloaded("full", running)
            self._queue.remove(pushed_out.request.client, pushed_out)
            self._note_wait(pushed_out, running.waiting_since)
        running.short_before = self._shortage.seconds(running.waiting_since)
        self._queue.push(request.client, demand.expected_tokens, running, request.priority)
        return pushed_out

    def again(self, running: Running) -> None:
        """The request's attempt is over, it is not: it goes on as soon as there is room."""
        self._started.pop(running, None)
        running.short_before = self._shortage.seconds(running.waiting_since)
        self._resumed.append(running)

    def next(self, now: float) -> Start | None:
        """Start the request whose turn it is; None while it must wait."""
        start, short_of = self._next(now)
        for pool, seconds in self._shortage.note(short_of, now).items():
            self._metrics.short.labels(pool=pool).inc(seconds)
        return start

    def _next(self, now: float) -> tuple[Start | None, Set[Role]]:
        """The request that starts, or the pools that have no room for it."""
        for running in self._resumed:
            avoid, demand = running.lifecycle.avoid, self._demand(running)
            pair = self._disaggregation.choose(self._registry, demand, avoid)
            if pair is None:
                return None, self._disaggregation.short_of(self._registry, demand)
            tried = {worker.worker_id for worker in pair.workers} & avoid
            if not tried or now - running.waiting_since >= SAME_AGAIN:
                self._resumed.remove(running)
                return self._start(running, pair, demand, now), frozenset()
        head = self._queue.head()
        if head is None:
            return None, frozenset()
        demand = self._demand(head)
        pair = self._disaggregation.choose(self._registry, demand)
        if pair is None:
            return None, self._disaggregation.short_of(self._registry, demand)
        return self._start(self._queue.pop(), pair, demand, now), frozenset()

    def leave(self, running: Running, now: float) -> None:
        """The request is over, wherever it was."""
        started = self._started.pop(running, None)
        if started is not None and running.lifecycle.token_ids:
            self._forecast.ended(len(running.lifecycle.token_ids), now - started)
        waited = self._queue.remove(running.request.client, running)
        if running in self._resumed:
            self._resumed.remove(running)
            waited = True
        if waited:
            self._note_wait(running, now)

    def overdue(self, now: float) -> list[Running]:
        """Requests that were forecast to start by now, and did not."""
        return [r for r in self._queue.items() if now - r.waiting_since > self._max_queue_time]

    def overloaded(self, reason: str, running: Running) -> OverloadedError:
        """What a request is told that is turned away for ``reason``."""
        self._metrics.shed.labels(reason=reason).inc()
        wait = self._wait(running)
        return OverloadedError(
            f"{self.num_waiting} requests are waiting, a new one would start in about {wait:.0f} s",
            retry_after=wait - self._longest_forecast,
        )

    def _start(self, running: Running, pair: Pair, demand: Demand, now: float) -> Start:
        self._started[running] = now
        self._note_wait(running, now)
        self._metrics.queue_time.observe(now - running.waiting_since)
        return Start(running, pair, demand)

    def _note_wait(self, running: Running, now: float) -> None:
        """The request's turn has come, or it is over: tell its timeline what it waited for."""
        waited_for = running.request.timeline.waited_for
        for pool, seconds in self._shortage.since(running.short_before, now).items():
            waited_for[pool] += seconds

    def _demand(self, running: Running) -> Demand:
        prompt = len(running.request.prompt_token_ids)
        output = self._forecast.output(running.request.sampling.max_tokens)
        expected = max(prompt + output, running.num_tokens + 1)
        return Demand(running.num_tokens, expected, running.prefix)

    def _wait(self, like: Running) -> float:
        """Seconds until a request like this one would start if it came now."""
        client, priority = like.request.client, like.request.priority
        ahead = [*self._resumed, *self._queue.ahead_of(client, priority)]
        demand, decodes = self._demand(like), self._registry.serving("decode")
        has_place = any(takes_sequence(w, demand) for w in decodes)
        return self._forecast_wait(ahead, has_place=has_place)

    def _forecast_wait(self, ahead: Sequence[Running], *, has_place: bool) -> float:
        """Seconds until those ``ahead`` have started; ``has_place``: somewhere in decode."""
        prefills = self._disaggregation.prompt_pool(self._registry)
        return self._forecast.wait(
            num_ahead=len(ahead),
            num_running=0 if has_place else len(self._started),
            tokens_ahead=sum(r.num_tokens for r in ahead) + sum(map(queued_tokens, prefills)),
            prefill_rate=sum(w.load.prefill_tokens_per_second for w in prefills),
        )
