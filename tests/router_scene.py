"""A dispatcher on a link that only keeps what is sent, and the messages of its workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry

from protocol.errors import KvferryError
from protocol.geometry import Fingerprint, KVGeometry
from protocol.link import Server
from protocol.messages import (
    FirstToken,
    Heartbeat,
    Message,
    Register,
    RequestFailed,
    Role,
    Tokens,
    TokenUpdate,
    WorkerLoad,
)
from protocol.sampling import SamplingParams
from router.dispatch import Dispatcher
from router.generation import GenerationRequest
from router.running import Running

M = TypeVar("M", bound=Message)

SOON = 20.0  # seconds, generous
LOAD = WorkerLoad(max_num_seqs=64, free_blocks=1000, total_blocks=1000)
ONE_SLOT = LOAD.model_copy(update={"max_num_seqs": 1})
REQUEST = GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=9))


class Wire:
    """A link that keeps what is sent. Messages to ``gone`` peers are refused."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.gone: set[bytes] = set()

    def send(self, peer: bytes, message: Message) -> bool:
        if peer not in self.gone:
            self.sent.append((peer, message))
        return peer not in self.gone

    async def receive(self) -> tuple[bytes, Message]:
        await asyncio.Event().wait()
        raise AssertionError

    def to(self, peer: str, kind: type[M]) -> list[M]:
        return [m for to, m in self.sent if to == peer.encode() and isinstance(m, kind)]

    def all(self, kind: type[M]) -> list[M]:
        """To whichever peer."""
        return [m for _, m in self.sent if isinstance(m, kind)]


def registration(
    worker_id: str, epoch: int = 1, session: int = 0, load: WorkerLoad = LOAD
) -> Register:
    role: Role = "prefill" if worker_id.startswith("p") else "decode"
    geometry = KVGeometry(num_kv_heads=1, num_layers=1, block_size=4, head_dim=4, dtype="float32")
    return Register(
        worker_id=worker_id,
        epoch=epoch,
        session=session,
        role=role,
        model="m",
        fingerprint=Fingerprint(weights_digest="00", rope="none", geometry=geometry),
        vocab_size=10,
        max_model_len=100,
        pid=1,
        host="h",
        control="c",
        data=b"",
        transport="t",
        metrics="",
        load=load,
    )


def first(attempt: int, index: int, token_id: int, name: str = "r") -> FirstToken:
    return FirstToken(
        request_id=f"{name}#{attempt}",
        index=index,
        token_id=token_id,
        finish_reason=None,
        num_cached_tokens=0,
    )


def tokens(
    attempt: int, index: int, *token_ids: int, last: bool = False, name: str = "r"
) -> Tokens:
    update = TokenUpdate(
        request_id=f"{name}#{attempt}",
        index=index,
        token_ids=list(token_ids),
        finish_reason="length" if last else None,
    )
    return Tokens(updates=[update])


class Scene:
    """A dispatcher with workers of one letter and a digit each, and one request."""

    def __init__(self, *workers: str, load: WorkerLoad = LOAD, **options: Any) -> None:
        self.wire = Wire()
        self.metrics = CollectorRegistry()
        self.num_said: Counter[str] = Counter()  # messages about requests, by worker
        self.load = load
        self.dispatcher = Dispatcher(cast("Server", self.wire), self.metrics, **options)
        for worker in workers:
            self.say(worker, registration(worker, load=load))

    def say(self, worker: str, message: Message) -> None:
        if isinstance(message, Register):
            self.num_said[worker] = 0
        self.num_said[worker] += isinstance(message, FirstToken | Tokens | RequestFailed)
        self.dispatcher._receive_one(worker.encode(), message)

    def beat(self, worker: str, load: WorkerLoad | None = None, late: int = 0) -> None:
        """``late``: of the router's messages, how many are still on their way to the worker."""
        known = self.dispatcher._members.registry.get(worker.encode())
        heartbeat = Heartbeat(
            epoch=1,
            load=load or self.load,
            num_sent=self.num_said[worker],
            num_received=known.num_sent - late if known else 0,
        )
        self.say(worker, heartbeat)

    def dispatch(self, request: GenerationRequest = REQUEST) -> Running:
        return self.dispatcher._dispatch(request)

    def ids(self) -> set[str]:
        return {row["id"] for row in self.dispatcher.workers()}

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(f"kvferry_{name}_total", labels) or 0.0


def output(running: Running) -> list[int]:
    """The tokens delivered so far."""
    chunk = running.output.take()
    return [] if chunk is None else chunk.token_ids


@asynccontextmanager
async def serving(scene: Scene) -> AsyncIterator[None]:
    task = asyncio.create_task(scene.dispatcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(scene: Scene, condition: Callable[[], bool], *alive: str) -> None:
    """Wait for the condition, with heartbeats of the workers that are ``alive``."""
    async with asyncio.timeout(SOON):
        while True:
            for worker in alive:
                scene.beat(worker)
            if condition():
                return
            await asyncio.sleep(0.01)


async def error_of(running: Running) -> KvferryError:
    while True:
        try:
            await asyncio.wait_for(running.output.get(), SOON)
        except KvferryError as error:
            return error
