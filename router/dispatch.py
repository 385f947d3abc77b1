"""Sends requests to workers and brings their tokens back: the I/O around the state machine."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, assert_never

from prometheus_client import CollectorRegistry

from protocol.errors import (
    KvferryError,
    OverloadedError,
    UnavailableError,
    error_from_code,
)
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
    WorkerLeft,
    WorkerLost,
)
from router.membership import Membership
from router.metrics import DispatchMetrics
from router.policy import Pair, choose_pair
from router.registry import Worker

log = logging.getLogger(__name__)

TICK = 0.1  # seconds
PATIENCE = 10.0  # seconds that a request whose attempt failed waits for workers


@dataclass(slots=True, eq=False)
class _Running:
    """A request between dispatch and its end."""

    request: GenerationRequest
    lifecycle: RequestLifecycle
    deadline: float
    pair: Pair | None = None  # of the present attempt
    waiting_since: float = 0.0
    output: asyncio.Queue[TokenChunk | KvferryError] = field(default_factory=asyncio.Queue)


class Dispatcher:
    """The router's ``Generator``: owns the link to the workers and every running request.

    The output queue of a request is bounded by its ``max_tokens``.
    """

    def __init__(
        self,
        link: Server,
        metrics: CollectorRegistry,
        *,
        request_timeout: float = 600.0,
        max_num_requests: int = 1024,
        max_retries: int = 3,
    ) -> None:
        router_id = secrets.token_hex(8)
        self._link = link
        self._metrics = DispatchMetrics(metrics)
        self._request_timeout = request_timeout
        self._max_num_requests = max_num_requests
        self._max_retries = max_retries
        self._members = Membership(link, router_id, self._on_lost)
        self._running: set[_Running] = set()
        self._by_attempt: dict[str, _Running] = {}

    # Generator -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests between dispatch and their end."""
        return len(self._running)

    @property
    def max_model_len(self) -> int:
        """What every serving worker can take, in tokens; 0 while there are none."""
        registry = self._members.registry
        workers = [*registry.serving("prefill"), *registry.serving("decode")]
        return min((worker.info.max_model_len for worker in workers), default=0)

    def not_ready_reason(self) -> str | None:
        """Why no request can be served now, or None."""
        try:
            choose_pair(self._members.registry)
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

    # Placing ---------------------------------------------------------------------------------

    def _dispatch(self, request: GenerationRequest) -> _Running:
        if len(self._running) >= self._max_num_requests:
            raise OverloadedError(f"{self._max_num_requests} requests are running already")
        pair = choose_pair(self._members.registry)
        timeout = self._request_timeout
        if request.timeout is not None:
            timeout = min(timeout, request.timeout)
        lifecycle = RequestLifecycle(request.request_id, self._max_retries)
        running = _Running(request, lifecycle, time.monotonic() + timeout)
        self._running.add(running)
        self._place(running, pair)
        return running

    def _place(self, running: _Running, pair: Pair) -> None:
        """Begin an attempt: the prompt and what was generated so far go to prefill."""
        request, lifecycle = running.request, running.lifecycle
        self._handle(running, Placed(pair.prefill.worker_id, pair.decode.worker_id))
        running.pair = pair
        self._by_attempt[lifecycle.attempt_id] = running
        token_ids = [*request.prompt_token_ids, *lifecycle.token_ids]
        for worker in (pair.prefill, pair.decode):
            worker.assigned[lifecycle.attempt_id] = len(token_ids)
        decode = pair.decode.info
        message = PrefillRequest(
            request_id=lifecycle.attempt_id,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            decode=PeerAddress(
                worker_id=decode.worker_id,
                epoch=decode.epoch,
                control=decode.control,
                data=decode.data,
            ),
            timeout=max(0.0, running.deadline - time.monotonic()),
        )
        if not self._link.send(pair.prefill.peer, message):
            self._members.lose(pair.prefill, "it cannot be reached")

    def _place_again(self, running: _Running, *, anywhere: bool) -> None:
        """Look for workers for the next attempt; ``anywhere``: even where one failed before."""
        avoid = running.lifecycle.avoid
        try:
            pair = choose_pair(self._members.registry, avoid)
        except UnavailableError as error:
            if time.monotonic() - running.waiting_since >= PATIENCE:
                self._handle(running, NoWorkers(str(error)))
            return
        if anywhere or avoid.isdisjoint((pair.prefill.worker_id, pair.decode.worker_id)):
            self._place(running, pair)

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
                self._from_worker(peer, message)
            case Tokens():
                for update in message.updates:
                    self._from_worker(peer, update)
            case _:
                log.warning("unexpected %s from a worker", type(message).__name__)

    def _from_worker(self, peer: bytes, message: FirstToken | TokenUpdate | RequestFailed) -> None:
        running = self._by_attempt.get(message.request_id)
        worker = self._members.registry.get(peer)
        if running is None or worker is None:
            self._metrics.stale.inc()
            if not isinstance(message, RequestFailed):  # the worker is still at it
                self._link.send(peer, Cancel(request_id=message.request_id))
        elif isinstance(message, RequestFailed):
            error = error_from_code(message.code, message.message)
            self._handle(running, AttemptFailed(worker.worker_id, error))
        else:
            self._handle(running, message)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for running in list(self._running):
                if now >= running.deadline:
                    self._handle(running, DeadlinePassed())
                elif running.lifecycle.state is RequestState.WAITING:
                    self._place_again(running, anywhere=True)

    def _on_lost(self, worker: Worker, left: bool) -> None:
        event = WorkerLeft(worker.worker_id) if left else WorkerLost(worker.worker_id)
        for running in list(self._running):
            if running.pair is not None and worker in (running.pair.prefill, running.pair.decode):
                self._handle(running, event)

    def _handle(self, running: _Running, event: Event) -> None:
        attempt_id = running.lifecycle.attempt_id
        actions = running.lifecycle.handle(event)
        state, pair = running.lifecycle.state, running.pair
        if pair is not None and state is not RequestState.PREFILLING:
            pair.prefill.assigned.pop(attempt_id, None)
        if pair is not None and state in (RequestState.WAITING, RequestState.ENDED):
            pair.decode.assigned.pop(attempt_id, None)
            self._by_attempt.pop(attempt_id, None)
        if state is RequestState.ENDED:
            self._running.discard(running)
        for action in actions:
            self._do(running, action)

    def _do(self, running: _Running, action: Action) -> None:
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
                        self._link.send(worker.peer, Cancel(request_id=attempt_id))
            case Retry(reason):
                log.info("request %s goes on elsewhere: %s", running.request.request_id, reason)
                self._metrics.retries.labels(reason=reason).inc()
                running.pair = None
                running.waiting_since = time.monotonic()
                self._place_again(running, anywhere=False)
            case _:
                assert_never(action)
