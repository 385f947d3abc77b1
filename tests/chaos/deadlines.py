"""Requests that run out of time, in whichever phase they are."""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from tests.chaos import phases
from tests.chaos.asks import Ask, draw
from tests.chaos.cancels import FREED
from tests.chaos.figures import Figures
from tests.chaos.scene import Scene

TIMEOUT = 0.05, 0.6  # seconds that a request may take, drawn for each
OVERDUE = 2.0  # seconds after which its client must know: cores are shared
OUT_OF_TIME = frozenset({"504 deadline_exceeded", "event deadline_exceeded"})


def deadlines_pass(scene: Scene, rng: random.Random) -> Figures:
    """Each phase's requests get little time; then others, while either worker stands still."""
    figures = Figures(allowed=OUT_OF_TIME)
    for phase in (
        phases.ROUTER_QUEUE,
        phases.PREFILL_QUEUE,
        phases.CHUNK,
        phases.DECODE_QUEUE,
        phases.DECODING,
    ):
        _run_out(scene, rng, figures, phase.asks(rng), nullcontext())
    for worker in scene.workers:
        asks = draw(rng, 4, prompt=(100, 200), output=(60, 90))
        _run_out(scene, rng, figures, asks, scene.frozen(worker))
    both = set(figures.errors) >= OUT_OF_TIME
    figures.require(both, "not both before and within their streams requests ran out of time")
    return figures


def _run_out(
    scene: Scene,
    rng: random.Random,
    figures: Figures,
    asks: list[Ask],
    meanwhile: AbstractContextManager[None],
) -> None:
    """Hold requests with little time each to ending in time, and both pools to being free then."""
    answers = scene.reference.answers(asks)
    hurried = [replace(ask, timeout=rng.uniform(*TIMEOUT)) for ask in asks]
    streams = [scene.clients.open(ask) for ask in hurried]
    time.sleep(rng.uniform(0, TIMEOUT[0]))
    with meanwhile:
        scene.clients.join(streams)
    ended = time.monotonic()
    figures.compare(streams, answers, scene.reference)
    overdue = max(s.ended - s.opened - (s.ask.timeout or 0.0) for s in streams)
    figures.require(overdue <= OVERDUE, f"a client knew more than {OVERDUE:g} s too late")
    scene.settle(figures, within=FREED)
    figures.recovery = max(figures.recovery or 0.0, time.monotonic() - ended)
