"""A router on a real socket, with a scripted ``Generator`` in the workers' place."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from protocol.errors import WorkerNotFoundError
from router.app import RouterSettings, create_app
from router.disaggregation import Disaggregation, Mode
from router.generation import GenerationRequest, QueueState, TokenChunk
from router.http_protocol import BoundedHttpProtocol
from router.registry import Registry
from router.text import TextModel
from router.what_if_routes import Question

MODEL = Path(__file__).parents[2] / "cli" / "demo_model"
MAX_MODEL_LEN = 256
PATIENCE = 20.0  # seconds

LOAD = {  # in a worker's row
    "max_num_seqs": 8, "num_running": 2, "num_waiting": 1, "waiting_tokens": 300,
    "free_blocks": 25, "total_blocks": 100,
}  # fmt: skip

HANG = "hang"  # in a script: nothing more comes
Script = Sequence[TokenChunk | Exception | str]


@dataclass(eq=False)
class ScriptedPools:
    """Takes every change of the pools, or refuses it."""

    change: dict[str, Any] | None = None
    refusal: Exception | None = None

    def present(self) -> dict[str, Any]:
        return {"prefill": 2, "decode": 2, "change": self.change}

    def resize(self, prefill: int, decode: int) -> None:
        if self.refusal:
            raise self.refusal
        flip = {"worker": "decode-0", "role": "prefill", "state": "draining", "seconds": 0.1}
        sizes = {"prefill": prefill, "decode": decode}
        self.change = {**sizes, "state": "running", "reason": None, "flips": [flip]}

    def flip(self, worker_id: str, role: str) -> None:
        raise WorkerNotFoundError(f"no worker {worker_id!r} is registered")


@dataclass(eq=False)
class ScriptedGenerator:
    """Plays ``script``, or what ``scripts`` says for the prompt, to every request."""

    script: Script = ()
    scripts: Callable[[GenerationRequest], Script] | None = None
    max_model_len: int = MAX_MODEL_LEN
    reason: str | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    num_open: int = 0
    num_given: int = 0  # chunks
    pools: ScriptedPools = field(default_factory=ScriptedPools)
    waiting: QueueState = field(default_factory=lambda: QueueState([], [], 0.0))
    prompts: Disaggregation = field(default_factory=Disaggregation)
    prediction: dict[str, Any] | Exception = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            for item in self.scripts(request) if self.scripts else self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, str):
                    await asyncio.Event().wait()
                else:
                    self.num_given += 1
                    yield item
                    await asyncio.sleep(0)
        finally:
            self.num_open -= 1

    def workers(self) -> list[dict[str, Any]]:
        return [{"id": "p", "role": "prefill", "metrics": "http://127.0.0.1:9/metrics"}]

    def drain(self, worker_id: str) -> dict[str, Any]:
        if worker_id != "p":
            raise WorkerNotFoundError(f"no worker {worker_id!r} is registered")
        return {"id": "p", "state": "leaving"}

    def queue(self) -> QueueState:
        return self.waiting

    def disaggregation(self) -> dict[str, Any]:
        return self.prompts.row(Registry(timeout=1.0))

    def disaggregate(self, mode: Mode, local_tokens: int | None) -> None:
        self.prompts.change(mode, local_tokens)

    async def predict(self, question: Question) -> dict[str, Any]:
        self.questions.append(question)
        if isinstance(self.prediction, Exception):
            raise self.prediction
        return self.prediction

    @property
    def colocated(self) -> bool:
        return False

    def not_ready_reason(self) -> str | None:
        return self.reason


@dataclass(eq=False)
class Router:
    """A running application."""

    url: str
    port: int
    generator: ScriptedGenerator
    text: TextModel

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def say(self, text: str, reason: str = "stop", *, at_once: int = 1) -> None:
        """Script a text, ``at_once`` tokens a chunk; "stop" ends it with an EOS token."""
        ids: list[int] = self.text.tokenizer.encode(text, add_special_tokens=False).ids
        if reason == "stop":
            ids = [*ids, self.text.eos_token_ids[0]]
        chunks = [ids[i : i + at_once] for i in range(0, len(ids), at_once)]
        self.generator.script = [
            *(TokenChunk(chunk) for chunk in chunks[:-1]),
            TokenChunk(chunks[-1], reason),
        ]

    def metrics(self) -> dict[str, float]:
        """Samples by name and label values, in the order of the labels' names."""
        page = httpx.get(self.url + "/metrics", timeout=PATIENCE).text
        return {
            " ".join((sample.name, *(v for _, v in sorted(sample.labels.items())))): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }


def eventually(condition: Callable[[], bool]) -> bool:
    """Poll until the condition holds; False if it never did."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="session")
def text() -> TextModel:
    return TextModel.load(MODEL)


@contextmanager
def routers(text: TextModel) -> Iterator[Callable[..., Router]]:
    """Starts routers with the settings given; they end with the block."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start_one(**settings: Any) -> Router:
        generator = ScriptedGenerator()
        app = create_app(
            RouterSettings(served_model_name="test", **settings),
            text,
            generator,
            CollectorRegistry(),
            generator.predict,
        )
        config = uvicorn.Config(
            app, http=BoundedHttpProtocol, log_level="critical", lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)
        listening = socket.create_server(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        assert eventually(lambda: server.started)
        return Router(f"http://127.0.0.1:{port}", port, generator, text)

    try:
        yield start_one
    finally:
        for server, _ in running:
            server.force_exit = server.should_exit = True
        for _, thread in running:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for _, thread in running)


@pytest.fixture
def start(text: TextModel) -> Iterator[Callable[..., Router]]:
    with routers(text) as start_one:
        yield start_one


@pytest.fixture
def router(start: Callable[..., Router]) -> Router:
    return start()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser import chromium  # it skips what needs it where there is no playwright

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    from tests.browser import page_of

    with page_of(browser, PATIENCE) as page:
        yield page
