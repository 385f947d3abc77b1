"""Clients that go away: in whichever phase their requests are, both pools are free in 2 s."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.chaos import phases
from tests.chaos.asks import Ask, draw
from tests.chaos.clients import Stream
from tests.chaos.figures import Figures
from tests.chaos.phases import Phase
from tests.chaos.scene import Scene
from tests.stack import IDLE, eventually

FREED = 2.0  # seconds after the clients went
LINGER = 0.05  # seconds in a phase at most

Reached = Callable[[list[Stream]], bool]


def on_arrival(scene: Scene, rng: random.Random) -> Figures:
    """Within 30 ms of sending, wherever the request is by then."""

    def reached(_: list[Stream]) -> bool:
        time.sleep(rng.uniform(0, 0.03))
        return True

    return _cancelled(scene, draw(rng, 8, prompt=(1, 400), output=(10, 100)), reached)


def in_router_queue(scene: Scene, rng: random.Random) -> Figures:
    """While more have come than the decode worker has room for."""
    return _cancelled_in(scene, rng, phases.ROUTER_QUEUE)


def in_prefill_queue(scene: Scene, rng: random.Random) -> Figures:
    """While one of two waits for the prefill worker, which takes one at a time."""
    return _cancelled_in(scene, rng, phases.PREFILL_QUEUE)


def in_a_chunk(scene: Scene, rng: random.Random) -> Figures:
    """While prefill computes their prompts, before any token."""
    return _cancelled_in(scene, rng, phases.CHUNK)


def waiting_for_a_grant(scene: Scene, rng: random.Random) -> Figures:
    """While prefill waits for blocks of a decode worker that does not answer."""
    asks = draw(rng, 2, prompt=(200, 400), output=(10, 60))
    figures = _cancelled_frozen(scene, asks, "decode-0", after=0.0)
    figures.require(figures.tokens_compared == 0, "there was a grant")
    return figures


def in_decode_queue(scene: Scene, rng: random.Random) -> Figures:
    """While more are handed off than the running batch takes."""
    return _cancelled_in(scene, rng, phases.DECODE_QUEUE)


def while_decoding(scene: Scene, rng: random.Random) -> Figures:
    """In the midst of their streams."""
    return _cancelled_in(scene, rng, phases.DECODING)


def while_decode_stands_still(scene: Scene, rng: random.Random) -> Figures:
    """While the decode worker is frozen, be it asked, written to or handed off to."""
    asks = draw(rng, 4, prompt=(100, 200), output=(60, 90))
    return _cancelled_frozen(scene, asks, "decode-0", after=rng.uniform(0.02, 0.25))


def while_prefill_stands_still(scene: Scene, rng: random.Random) -> Figures:
    """While the prefill worker is frozen, be it computing, sending or handing off."""
    asks = draw(rng, 4, prompt=(100, 200), output=(60, 90))
    return _cancelled_frozen(scene, asks, "prefill-0", after=rng.uniform(0.02, 0.25))


def _cancelled_in(scene: Scene, rng: random.Random, phase: Phase) -> Figures:
    """Cancel all a moment after a phase is reached."""

    def reached(streams: list[Stream]) -> bool:
        return phase.reached(scene, streams)

    return _cancelled(scene, phase.asks(rng), reached, linger=rng.uniform(0, LINGER))


def _cancelled(scene: Scene, asks: list[Ask], reached: Reached, linger: float = 0.0) -> Figures:
    """Cancel all ``linger`` seconds after a moment is reached."""
    answers = scene.reference.answers(asks)
    figures = Figures()
    began = time.monotonic()
    streams = [scene.clients.open(ask) for ask in asks]
    figures.require(eventually(lambda: reached(streams), IDLE), "the phase was not reached")
    time.sleep(linger)
    figures.open_then = sum(not stream.ending for stream in streams)
    figures.disturbed_after = time.monotonic() - began
    scene.clients.cancel(streams)
    return _freed(scene, figures, streams, answers)


def _cancelled_frozen(scene: Scene, asks: list[Ask], worker: str, *, after: float) -> Figures:
    """Cancel all while a worker stands still, not long enough to be given up."""
    answers = scene.reference.answers(asks)
    figures = Figures()
    began = time.monotonic()
    streams = [scene.clients.open(ask) for ask in asks]
    time.sleep(after)
    with scene.frozen(worker):
        time.sleep(0.5)
        figures.open_then = sum(not stream.ending for stream in streams)
        figures.disturbed_after = time.monotonic() - began
        scene.clients.cancel(streams)
        time.sleep(0.3)
    return _freed(scene, figures, streams, answers)


def _freed(
    scene: Scene, figures: Figures, streams: list[Stream], answers: list[list[int]]
) -> Figures:
    """Hold the two pools to being free in time, and the tokens until then to the answers."""
    went = time.monotonic()
    scene.clients.join(streams)
    scene.settle(figures, within=FREED)
    figures.recovery = time.monotonic() - went
    figures.compare(streams, answers, scene.reference)
    return figures
