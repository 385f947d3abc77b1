"""One thread of a worker stands still while the others run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.chaos.asks import draw
from tests.chaos.figures import Figures
from tests.chaos.scene import Scene, play_disturbed
from tests.chaos.threads import sleeping, stopped
from tests.stack import IDLE, eventually

NOTICED = 10.0  # seconds until the worker says so; promised are 5, on cores of its own
IDLE_IN = {"engine": "futex until woken", "transfer thread": "poll for 1000 ms"}
ATTEMPTS = 50  # to stop a thread while it does not hold the interpreter's lock


def thread_stuck(scene: Scene, rng: random.Random) -> Figures:
    """A worker whose engine or transfer thread stands still says so itself; the others do not.

    Streams wait, and go on when the thread does.
    """
    scene.seconds_to_full_service(rng)  # a thread begins with its first work
    victim, part = rng.choice(list(scene.workers)), rng.choice(list(IDLE_IN))
    thread = sleeping(scene.stack.processes[victim].pid, IDLE_IN[part])
    rows = scene.stack.workers()
    ready = {row["id"]: row["metrics"].replace("/metrics", "/ready") for row in rows}

    def disturb(figures: Figures) -> None:
        asks = draw(rng, 2 * len(scene.workers), prompt=(20, 40), output=(4, 8))
        answers = scene.reference.answers(asks)
        with _stopped_outside_python(thread, scene, ready[victim]):
            streams = [scene.clients.open(ask) for ask in asks]  # a step for every engine
            said = eventually(lambda: part in _answer(scene, ready[victim]), NOTICED)
            figures.require(said, f"nobody noticed that the {part} was stuck")
            figures.evidence.append(f"{victim}, {part}: {_answer(scene, ready[victim])!r}")
            others = {_answer(scene, page) for name, page in ready.items() if name != victim}
            figures.require(others == {"ready\n"}, "others were not ready either")
        scene.clients.join(streams)
        figures.compare(streams, answers, scene.reference)
        figures.require(
            eventually(lambda: _answer(scene, ready[victim]) == "ready\n", IDLE),
            "it was not ready again",
        )
        figures.recovery = scene.seconds_to_full_service(rng)

    figures = play_disturbed(scene, rng, disturb)
    scene.kill(victim)  # for the next play: it takes steps as long as its longest for normal
    scene.settle(figures)
    return figures


@contextmanager
def _stopped_outside_python(thread: int, scene: Scene, page: str) -> Iterator[None]:
    """Stop a thread where it holds no other one up, as one that waits for a device does."""
    for _ in range(ATTEMPTS):
        with stopped(thread):
            if _answer(scene, page):
                yield
                return
        time.sleep(0.01)
    raise AssertionError(f"the thread held the interpreter's lock {ATTEMPTS} times")


def _answer(scene: Scene, page: str) -> str:
    """What a worker says of its readiness; nothing if it does not answer."""
    try:
        return scene.stack.client.get(page, timeout=1.0).text
    except httpx.TransportError:
        return ""
