"""Sends requests to workers and brings their tokens back: the I/O around the state machine."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, assert_never

from prometheus_client import CollectorRegistry

from protocol.errors import KvferryError, OverloadedError, UnavailableError, error_from_code
from protocol.link import Server
from protocol.messages import (
    Cancel,
    FirstToken,
    Heartbeat,
    Leaving,
    Left,
    Message,
    PeerAddress,
    PrefillRequest,
    Register,
    RequestFailed,
    Tokens,
    TokenUpdate,
)
from router import timeline
from router.admission import Admission, Start
from router.generation import GenerationRequest, TokenChunk
from router.lifecycle import RequestLifecycle, RequestState
from router.lifecycle_events import (
    Action,
    AttemptFailed,
    CancelOn,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Event,
    Fail,
    NoWorkers,
    Placed,
    Retry,
    Shed,
    WorkerLeft,
    WorkerLost,
)
from router.membership import Membership
from router.metrics import DispatchMetrics, QueueMetrics
from router.policy import check_serving
from router.registry import Assignment, Worker
from router.running import Running

log = logging.getLogger(__name__)

TICK = 0.1  # seconds
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        router_id = secrets.token_hex(8)
        self._link = link
        self._clock = clock
        self._metrics = DispatchMetrics(metrics)
        self._request_timeout = request_timeout
        self._max_retries = max_retries
        self._members = Membership(link, router_id, self._on_lost)
        self._admission = Admission(
            self._members.registry,
            QueueMetrics(metrics, lambda: self._admission.num_waiting),
            max_queue_time=max_queue_time,
            max_num_requests=max_num_requests,
        )
        self._running: set[Running] = set()
        self._by_attempt: dict[str, Running] = {}
        self._served_at = self._clock()  # when both pools were last there

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
            check_serving(self._members.registry)
        except UnavailableError as error:
            return str(error)
        return None

    def workers(self) -> list[dict[str, Any]]:
        """One row a worker."""
        return [worker.row() for worker in self._members.registry.all()]

    def drain(self, worker_id: str) -> dict[str, Any]:
        """Ask a worker to leave the pools; its row. Raises WorkerNotFoundError."""
        return self._members.drain(worker_id).row()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the request's tokens; see ``router.generation.Generator``."""
        running = self._dispatch(request)
        try:
            while True:
                item = await running.output.get()
                if isinstance(item, KvferryError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._handle(running, ClientGone())
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
        self._start_waiting()
        return running

    def _start_waiting(self) -> None:
        while (start := self._admission.next(self._clock())) is not None:
            self._place(start)

    def _place(self, start: Start) -> None:
        """Begin an attempt: the prompt and what was generated so far go to prefill."""
        running, pair = start.running, start.pair
        request, lifecycle = running.request, running.lifecycle
        self._handle(running, Placed(pair.prefill.worker_id, pair.decode.worker_id))
        running.pair = pair
        request.timeline.attempts.append((lifecycle.prefill_id, lifecycle.decode_id))
        self._by_attempt[lifecycle.attempt_id] = running
        token_ids = [*request.prompt_token_ids, *lifecycle.token_ids]
        expected = start.demand.expected_tokens
        for worker, begun in ((pair.prefill, True), (pair.decode, False)):
            worker.assigned[lifecycle.attempt_id] = Assignment(len(token_ids), expected, begun)
        decode = pair.decode.info
        message = PrefillRequest(
            request_id=lifecycle.attempt_id,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            decode=PeerAddress(
                worker_id=decode.worker_id,
                epoch=decode.epoch,
                control=decode.control,
                data=decode.data,
            ),
            timeout=max(0.0, running.deadline - self._clock()),
        )
        if not self._members.send(pair.prefill, message):
            self._members.lose(pair.prefill, "it cannot be reached")

    def _shed(self, running: Running, reason: str) -> None:
        error = self._admission.overloaded(reason, running)
        self._handle(running, Shed(error))

    # Events ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the link until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._members.run())
            tasks.create_task(self._receive())
            tasks.create_task(self._tick())

    async def _receive(self) -> None:
        while True:
            peer, message = await self._link.receive()
            self._receive_one(peer, message)

    def _receive_one(self, peer: bytes, message: Message) -> None:
        match message:
            case Register() | Heartbeat() | Leaving() | Left():
                self._members.handle(peer, message)
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
        running = self._by_attempt.get(message.request_id)
        if running is None or worker is None:
            self._metrics.stale.inc()
            if worker is not None and not isinstance(message, RequestFailed):  # it is still at it
                self._members.send(worker, Cancel(request_id=message.request_id))
        elif isinstance(message, RequestFailed):
            error = error_from_code(message.code, message.message)
            if isinstance(error, OverloadedError) and running.pair is not None:
                running.pair.decode.full = True
            self._handle(running, AttemptFailed(worker.worker_id, error))
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
            self._handle(running, DeadlinePassed())
        for running in self._admission.overdue(now):
            self._shed(running, "overdue")
        reason = self.not_ready_reason()
        if reason is None:
            self._served_at = now
        elif now - self._served_at >= PATIENCE:
            for running in self._admission.waiting():
                self._handle(running, NoWorkers(reason))
        self._start_waiting()

    def _on_lost(self, worker: Worker, left: bool) -> None:
        event = WorkerLeft(worker.worker_id) if left else WorkerLost(worker.worker_id)
        for running in list(self._running):
            if running.pair is not None and worker in (running.pair.prefill, running.pair.decode):
                self._handle(running, event)
        self._start_waiting()

    def _handle(self, running: Running, event: Event) -> None:
        before, attempt_id, now = (
            running.lifecycle.state,
            running.lifecycle.attempt_id,
            self._clock(),
        )
        told = FirstToken if before is RequestState.PREFILLING else TokenUpdate
        if isinstance(event, told):
            running.request.timeline.account(event.account, now)
        actions = running.lifecycle.handle(event)
        state, pair = running.lifecycle.state, running.pair
        if state is not before:
            running.request.timeline.enter(STAGES[state], now)
        if pair is not None and state is not RequestState.PREFILLING:
            pair.prefill.end(attempt_id)
        if pair is not None and state in (RequestState.WAITING, RequestState.ENDED):
            pair.decode.end(attempt_id)
            self._by_attempt.pop(attempt_id, None)
        if pair is not None and state is RequestState.DECODING:
            assignment = pair.decode.assigned.get(attempt_id)
            if assignment is not None:
                assignment.begun, assignment.num_tokens = True, running.num_tokens
        if state is RequestState.ENDED:
            self._running.discard(running)
            self._admission.leave(running, now)
        for action in actions:
            self._do(running, action)

    def _do(self, running: Running, action: Action) -> None:
        match action:
            case Deliver(chunk):
                running.output.put_nowait(chunk)
            case Fail(error):
                running.output.put_nowait(error)
            case CancelOn(worker_id, attempt_id):
                assert running.pair is not None
                for worker in (running.pair.prefill, running.pair.decode):
                    known = self._members.registry.get(worker.peer) is worker
                    if worker.worker_id == worker_id and known:
                        self._members.send(worker, Cancel(request_id=attempt_id))
            case Retry(reason):
                log.info("request %s goes on elsewhere: %s", running.request.request_id, reason)
                self._metrics.retries.labels(reason=reason).inc()
                running.pair = None
                running.waiting_since = self._clock()
                self._admission.again(running)
            case _:
                assert_never(action)
