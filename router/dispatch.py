"""Sends requests to workers and brings their tokens back: the I/O around the state machine."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, assert_never

from prometheus_client import CollectorRegistry

from protocol.errors import OverloadedError, UnavailableError, error_from_code
from protocol.link import Server
from protocol.messages import (
    CacheChanges,
    Cancel,
    FirstToken,
    Heartbeat,
    Leaving,
    Left,
    Message,
    Register,
    RequestFailed,
    Tokens,
    TokenUpdate,
)
from router import lifecycle_events as events
from router import timeline
from router.admission import Admission, Start
from router.attempts import Attempts
from router.cache_directory import CacheDirectory
from router.disaggregation import Disaggregation, Mode
from router.generation import GenerationRequest, QueueState, TokenChunk
from router.lifecycle import RequestLifecycle, RequestState
from router.lifecycle_events import Action, Event
from router.membership import Membership
from router.metrics import DispatchMetrics, QueueMetrics
from router.pools import Pools
from router.registry import Worker
from router.running import Running

log = logging.getLogger(__name__)

TICK = 0.1  # seconds
TURN = 0.005  # seconds of reading messages that wait, until everything else has its turn
PATIENCE = 10.0  # seconds without workers until requests that wait for them fail
STAGES = {  # of a request's timeline
    RequestState.WAITING: timeline.ROUTER_QUEUE,
    RequestState.PREFILLING: timeline.PREFILL,
    RequestState.DECODING: timeline.DECODE,
    RequestState.ENDED: timeline.DELIVER,
}


class Dispatcher:
    """The router's ``Generator``: owns the link to the workers and every request until its end."""

    def __init__(
        self,
        link: Server,
        metrics: CollectorRegistry,
        *,
        request_timeout: float = 600.0,
        max_num_requests: int = 1024,
        max_queue_time: float = 30.0,
        max_retries: int = 3,
        disaggregation: Disaggregation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        router_id = secrets.token_hex(8)
        self._link = link
        self._clock = clock
        self._metrics = DispatchMetrics(metrics)
        self._request_timeout = request_timeout
        self._max_retries = max_retries
        self._members = Membership(link, router_id, self._on_lost, clock)
        self._caches = CacheDirectory(self._members.registry, link, metrics)
        self._attempts = Attempts(self._members, clock)
        self._disaggregation = disaggregation or Disaggregation()
        self._admission = Admission(
            self._members.registry,
            QueueMetrics(metrics, lambda: self._admission.num_waiting),
            self._disaggregation,
            max_queue_time=max_queue_time,
            max_num_requests=max_num_requests,
        )
        self._running: set[Running] = set()
        self._served_at = self._clock()  # when all that is needed was last there
        self._ends = False

    # Generator -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests between their arrival and their end."""
        return len(self._running)

    @property
    def max_model_len(self) -> int:
        """What every serving worker can take, in tokens; 0 while there are none."""
        registry = self._members.registry
        workers = [*registry.serving("prefill"), *registry.serving("decode")]
        return min((worker.info.max_model_len for worker in workers), default=0)

    def not_ready_reason(self) -> str | None:
        """Why no request can be served now, or None; being full is no reason."""
        try:
            self._disaggregation.check(self._members.registry)
        except UnavailableError as error:
            return str(error)
        return None

    @property
    def colocated(self) -> bool:
        """Whether decode workers compute all prompts themselves."""
        return self._disaggregation.colocated(self._members.registry)

    def workers(self) -> list[dict[str, Any]]:
        """One row a worker."""
        return [worker.row() for worker in self._members.registry.all()]

    def drain(self, worker_id: str) -> dict[str, Any]:
        """Ask a worker to leave the pools; its row. Raises WorkerNotFoundError."""
        return self._members.drain(worker_id).row()

    @property
    def pools(self) -> Pools:
        """The sizes of both pools, and their change."""
        return self._members.pools

    def queue(self) -> QueueState:
        """What waits in the router."""
        return self._admission.queue(self._clock())

    def disaggregation(self) -> dict[str, Any]:
        """Who computes prompts; see ``router.generation.Generator``."""
        return self._disaggregation.row(self._members.registry)

    def disaggregate(self, mode: Mode, local_tokens: int | None) -> None:
        """Change that, for waiting requests too. Raises ConfigError."""
        self._disaggregation.change(mode, local_tokens)
        self._start_waiting()

    def shut_down(self) -> None:
        """Fail every request that is under way, and all that are yet to come."""
        self._ends = True
        for running in list(self._running):
            self._handle(running, events.RouterEnds())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the request's tokens; see ``router.generation.Generator``."""
        running = self._dispatch(request)
        try:
            while True:
                chunk = await running.output.get()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._handle(running, events.ClientGone())
            self._start_waiting()

    # Placing ---------------------------------------------------------------------------------

    def _dispatch(self, request: GenerationRequest) -> Running:
        timeout = self._request_timeout
        if request.timeout is not None:
            timeout = min(timeout, request.timeout)
        lifecycle = RequestLifecycle(request.request_id, self._max_retries)
        now = self._clock()
        running = Running(request, lifecycle, now + timeout, now)
        pushed_out = self._admission.arrive(running)
        self._running.add(running)
        if pushed_out is not None:
            self._shed(pushed_out, "pushed_out")
        if self._ends:
            self._handle(running, events.RouterEnds())
        self._start_waiting()
        return running

    def _start_waiting(self) -> None:
        while (start := self._admission.next(self._clock())) is not None:
            self._place(start)

    def _place(self, start: Start) -> None:
        """Begin an attempt."""
        running, pair = start.running, start.pair
        prefill_id = pair.prefill.worker_id if pair.prefill else None
        self._handle(running, events.Placed(prefill_id, pair.decode.worker_id))
        running.request.timeline.attempts.append((prefill_id, pair.decode.worker_id))
        self._metrics.paths.labels(path="remote" if pair.prefill else "local").inc()
        self._attempts.begin(start)

    def _shed(self, running: Running, reason: str) -> None:
        error = self._admission.overloaded(reason, running)
        self._handle(running, events.Shed(error))

    # Events ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the link until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._members.run())
            tasks.create_task(self._receive())
            tasks.create_task(self._tick())

    async def _receive(self) -> None:
        turn_ends = 0.0
        while True:
            peer, message = await self._link.receive()  # which does not wait if one is there
            self._receive_one(peer, message)
            if time.monotonic() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + TURN

    def _receive_one(self, peer: bytes, message: Message) -> None:
        match message:
            case Register() | Heartbeat() | Leaving() | Left():
                self._members.handle(peer, message)
            case CacheChanges():
                self._caches.handle(peer, message)
            case FirstToken() | RequestFailed():
                self._from_worker(self._members.sender(peer), message)
            case Tokens():
                worker = self._members.sender(peer)
                for update in message.updates:
                    self._from_worker(worker, update)
            case _:
                log.warning("unexpected %s from a worker", type(message).__name__)
        self._start_waiting()

    def _from_worker(
        self, worker: Worker | None, message: FirstToken | TokenUpdate | RequestFailed
    ) -> None:
        running = self._attempts.find(message.request_id)
        if running is None or worker is None:
            self._metrics.stale.inc()
            if worker is not None and not isinstance(message, RequestFailed):  # it is still at it
                self._members.send(worker, Cancel(request_id=message.request_id))
        elif isinstance(message, RequestFailed):
            error = error_from_code(message.code, message.message)
            if isinstance(error, OverloadedError) and running.pair is not None:
                running.pair.decode.full = True
            self._handle(running, events.AttemptFailed(worker.worker_id, error))
        else:
            self._handle(running, message)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._check_times()

    def _check_times(self) -> None:
        """End what has taken too long, in whichever state it is."""
        now = self._clock()
        for running in [r for r in self._running if now >= r.deadline]:
            self._handle(running, events.DeadlinePassed())
        for running in self._admission.overdue(now):
            self._shed(running, "overdue")
        reason = self.not_ready_reason()
        if reason is None:
            self._served_at = now
        elif now - self._served_at >= PATIENCE:
            for running in self._admission.waiting():
                self._handle(running, events.NoWorkers(reason))
        self._start_waiting()

    def _on_lost(self, worker: Worker, left: bool) -> None:
        event = events.WorkerLeft(worker.worker_id) if left else events.WorkerLost(worker.worker_id)
        for running in list(self._running):
            if running.pair is not None and worker in running.pair.workers:
                self._handle(running, event)
        self._start_waiting()

    def _handle(self, running: Running, event: Event) -> None:
        lifecycle, times, now = running.lifecycle, running.request.timeline, self._clock()
        before, attempt_id = lifecycle.state, lifecycle.attempt_id
        if before is RequestState.PREFILLING and isinstance(event, FirstToken):
            times.account(event.account, now)
            self._caches.prompt_computed(running, event)
        elif before is RequestState.DECODING and isinstance(event, TokenUpdate) and event.account:
            self._handed_off(times.account(event.account, now))
        actions = lifecycle.handle(event)
        if lifecycle.state is not before:
            times.enter(STAGES[lifecycle.state], now)
        self._attempts.note(running, attempt_id)
        if lifecycle.state is RequestState.ENDED:
            if before is RequestState.DECODING:
                self._caches.output_computed(running)
            self._running.discard(running)
            self._admission.leave(running, now)
        for action in actions:
            self._do(running, action)

    def _handed_off(self, seconds: float) -> None:
        self._metrics.handoff_seconds.observe(seconds)
        self._disaggregation.handed_off(seconds)

    def _do(self, running: Running, action: Action) -> None:
        match action:
            case events.Deliver(chunk):
                running.output.put(chunk)
            case events.Fail(error):
                running.output.put(error)
            case events.CancelOn(worker_id, attempt_id):
                self._attempts.cancel(running, worker_id, attempt_id)
            case events.Retry(reason):
                log.info("request %s goes on elsewhere: %s", running.request.request_id, reason)
                self._metrics.retries.labels(reason=reason).inc()
                running.pair = None
                running.waiting_since = self._clock()
                self._admission.again(running)
            case _:
                assert_never(action)
