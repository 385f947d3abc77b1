"""Sends requests to workers and brings their tokens back: the I/O around the state machine."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import KvferryError, OverloadedError, UnavailableError
from protocol.link import Server
from protocol.messages import (
    Cancel,
    FirstToken,
    Heartbeat,
    Leaving,
    Message,
    PeerAddress,
    PrefillRequest,
    Register,
    RegisterAgain,
    Registered,
    RequestFailed,
    Tokens,
    TokenUpdate,
)
from router.generation import GenerationRequest, TokenChunk
from router.lifecycle import (
    Action,
    CancelOn,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Event,
    Fail,
    RequestLifecycle,
    RequestState,
    WorkerLost,
)
from router.policy import Pair, choose_pair
from router.registry import Registry, Worker

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 0.5  # seconds
HEARTBEATS_MISSED = 6  # until a worker counts as lost


@dataclass(slots=True, eq=False)
class _Running:
    """A request between dispatch and its end."""

    lifecycle: RequestLifecycle
    pair: Pair
    deadline: float
    output: asyncio.Queue[TokenChunk | KvferryError] = field(default_factory=asyncio.Queue)


class Dispatcher:
    """The router's ``Generator``: owns the link to the workers and every running request.

    The output queue of a request is bounded by its ``max_tokens``.
    """

    def __init__(
        self, link: Server, *, request_timeout: float = 600.0, max_num_requests: int = 1024
    ) -> None:
        self.router_id = secrets.token_hex(8)
        self._link = link
        self._request_timeout = request_timeout
        self._max_num_requests = max_num_requests
        self._registry = Registry(HEARTBEAT_INTERVAL * HEARTBEATS_MISSED)
        self._running: dict[str, _Running] = {}

    # Generator -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests between dispatch and their end."""
        return len(self._running)

    @property
    def max_model_len(self) -> int:
        """What every serving worker can take, in tokens; 0 while there are none."""
        workers = [*self._registry.serving("prefill"), *self._registry.serving("decode")]
        return min((worker.info.max_model_len for worker in workers), default=0)

    def not_ready_reason(self) -> str | None:
        """Why no request can be served now, or None."""
        try:
            choose_pair(self._registry)
        except UnavailableError as error:
            return str(error)
        return None

    def workers(self) -> list[dict[str, Any]]:
        """One row a worker."""
        return [_row(worker) for worker in self._registry.all()]

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

    def _dispatch(self, request: GenerationRequest) -> _Running:
        if len(self._running) >= self._max_num_requests:
            raise OverloadedError(f"{self._max_num_requests} requests are running already")
        pair = choose_pair(self._registry)
        decode = pair.decode.info
        message = PrefillRequest(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            decode=PeerAddress(
                worker_id=decode.worker_id,
                epoch=decode.epoch,
                control=decode.control,
                data=decode.data,
            ),
            timeout=self._request_timeout,
        )
        if not self._link.send(pair.prefill.peer, message):
            raise UnavailableError(f"prefill worker {pair.prefill.worker_id} cannot be reached")
        lifecycle = RequestLifecycle(
            request.request_id, pair.prefill.worker_id, pair.decode.worker_id
        )
        running = _Running(lifecycle, pair, time.monotonic() + self._request_timeout)
        self._running[request.request_id] = running
        for worker in (pair.prefill, pair.decode):
            worker.assigned[request.request_id] = len(request.prompt_token_ids)
        return running

    # Events ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the link until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._tick())

    async def _receive(self) -> None:
        while True:
            peer, message = await self._link.receive()
            self._receive_one(peer, message)

    def _receive_one(self, peer: bytes, message: Message) -> None:
        now = time.monotonic()
        match message:
            case Register():
                log.info("worker %s joined as %s", message.worker_id, message.role)
                for replaced in self._registry.register(peer, message, now):
                    self._lose(replaced, "replaced by a new start of itself")
                answer = Registered(router_id=self.router_id, heartbeat_interval=HEARTBEAT_INTERVAL)
                self._link.send(peer, answer)
            case Heartbeat():
                if not self._registry.heartbeat(peer, message, now):
                    self._link.send(peer, RegisterAgain())
            case Leaving():
                self._registry.leave(peer)
            case FirstToken():
                self._from_worker(peer, message.request_id, message)
            case Tokens():
                for update in message.updates:
                    self._from_worker(peer, update.request_id, update)
            case RequestFailed():
                self._from_worker(peer, message.request_id, message)
            case _:
                log.warning("unexpected %s from a worker", type(message).__name__)

    def _from_worker(
        self, peer: bytes, request_id: str, event: FirstToken | TokenUpdate | RequestFailed
    ) -> None:
        running = self._running.get(request_id)
        if running is not None:
            self._handle(running, event)
        elif not isinstance(event, RequestFailed):
            self._link.send(peer, Cancel(request_id=request_id))  # nobody waits for it

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            now = time.monotonic()
            for worker in self._registry.expire(now):
                self._lose(worker, "no heartbeat")
            for running in [r for r in self._running.values() if now >= r.deadline]:
                self._handle(running, DeadlinePassed())

    def _lose(self, worker: Worker, reason: str) -> None:
        log.warning("worker %s lost: %s", worker.worker_id, reason)
        for running in list(self._running.values()):
            if worker in (running.pair.prefill, running.pair.decode):
                self._handle(running, WorkerLost(worker.worker_id))

    def _handle(self, running: _Running, event: Event) -> None:
        for action in running.lifecycle.handle(event):
            self._do(running, action)
        request_id = running.lifecycle.request_id
        if running.lifecycle.state is not RequestState.PREFILLING:
            running.pair.prefill.assigned.pop(request_id, None)
        if running.lifecycle.state is RequestState.ENDED:
            running.pair.decode.assigned.pop(request_id, None)
            self._running.pop(request_id, None)

    def _do(self, running: _Running, action: Action) -> None:
        match action:
            case Deliver(chunk):
                running.output.put_nowait(chunk)
            case Fail(error):
                running.output.put_nowait(error)
            case CancelOn(worker_id):
                for worker in (running.pair.prefill, running.pair.decode):
                    if worker.worker_id == worker_id and self._registry.get(worker.peer) is worker:
                        cancel = Cancel(request_id=running.lifecycle.request_id)
                        self._link.send(worker.peer, cancel)


def _row(worker: Worker) -> dict[str, Any]:
    info = worker.info
    return {
        "id": info.worker_id,
        "role": info.role,
        "state": worker.state.value,
        "pid": info.pid,
        "host": info.host,
        "address": info.control,
        "data_address": info.data.decode(errors="replace"),
        "metrics": info.metrics,
        "model": info.model,
        "epoch": info.epoch,
        "transport": info.transport,
        "requests": len(worker.assigned),
        "load": worker.load.model_dump(),
    }
