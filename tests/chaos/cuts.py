"""Lines between hosts that are cut or bad for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

from tests.chaos.asks import draw
from tests.chaos.figures import Figures
from tests.chaos.line import Condition
from tests.chaos.network import Direction, Network, NetworkStack
from tests.chaos.scene import Scene, play_disturbed

CUT = 3.0  # seconds
HEALED = 10.0  # seconds from healing to full service
NARROW = Condition(rate=50e6 / 8)  # KV overflows the queue, and TCP finds the rate by what is lost
LOSSY = Condition(loss=0.01)
VERY_LOSSY = Condition(loss=0.05)
SLOW = Condition(delay=0.02, jitter=0.01, overtaking=0.05)


def pools_cut(scene: Scene, rng: random.Random) -> Figures:
    """Prefill and decode pool do not reach each other for 3 s; both reach the router."""
    return _cut(scene, rng, network(scene).among(scene.workers))


def router_cut(scene: Scene, rng: random.Random) -> Figures:
    """The router reaches no worker for 3 s; the pools reach each other."""
    return _cut(scene, rng, network(scene).touching("router"))


def worker_cut(scene: Scene, rng: random.Random) -> Figures:
    """One worker reaches nobody for 3 s."""
    return _cut(scene, rng, network(scene).touching(rng.choice(list(scene.workers))))


def _cut(scene: Scene, rng: random.Random, directions: Iterable[Direction]) -> Figures:
    def disturb(figures: Figures) -> None:
        with network(scene).spoilt(directions, Condition(cut=True)):
            time.sleep(CUT)
        figures.recovery = scene.seconds_to_full_service(rng)
        figures.require(figures.recovery <= HEALED, f"no full service {HEALED:g} s after healing")

    return play_disturbed(scene, rng, disturb)


def narrow_lines(scene: Scene, rng: random.Random) -> Figures:
    """Every line loses what comes faster than 50 Mbit/s."""
    return _bad_lines(scene, rng, NARROW)


def lossy_lines(scene: Scene, rng: random.Random) -> Figures:
    """Every line loses 1 % of all packets at random."""
    return _bad_lines(scene, rng, LOSSY)


def very_lossy_lines(scene: Scene, rng: random.Random) -> Figures:
    """Every line loses 5 % of all packets at random."""
    return _bad_lines(scene, rng, VERY_LOSSY)


def slow_lines(scene: Scene, rng: random.Random) -> Figures:
    """Every line takes 10 to 30 ms, but for one packet in twenty, which overtakes the others."""
    return _bad_lines(scene, rng, SLOW)


def _bad_lines(scene: Scene, rng: random.Random, condition: Condition) -> Figures:
    lines = network(scene)

    def disturb(figures: Figures) -> None:
        before = lines.num_lost
        with lines.spoilt(lines.among(["router", *scene.workers]), condition):
            asks = draw(rng, 6, prompt=(700, 1500), output=(20, 40))  # much KV to move
            answers = scene.reference.answers(asks)
            streams = [scene.clients.open(ask) for ask in asks]
            scene.clients.join(streams)
        figures.compare(streams, answers, scene.reference)
        spoilt = condition.delay > 0 or lines.num_lost > before
        figures.require(spoilt, "the lines lost nothing")
        figures.recovery = scene.seconds_to_full_service(rng)

    return play_disturbed(scene, rng, disturb)


def network(scene: Scene) -> Network:
    """What joins a scene's hosts."""
    assert isinstance(scene.stack, NetworkStack), "lines are spoilt between separate hosts"
    return scene.stack.network
