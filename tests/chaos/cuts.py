"""Lines between hosts that are cut or bad for a while."""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager, ExitStack

from tests.chaos.asks import draw
from tests.chaos.figures import Figures
from tests.chaos.network import Network, NetworkStack
from tests.chaos.scene import Scene, play_disturbed

CUT = 3.0  # seconds
HEALED = 10.0  # seconds from healing to full service
# A queue of 64 KiB before 50 Mbit/s: KV overflows it, and TCP finds the rate by what is lost.
NARROW = ("tbf", "rate", "50mbit", "burst", "32kb", "limit", "64kb")
LOSSY = ("netem", "loss", "2%", "delay", "5ms")


def pools_cut(scene: Scene, rng: random.Random) -> Figures:
    """Prefill and decode pool do not reach each other for 3 s; both reach the router."""
    return _cut(scene, rng, _network(scene).separated(list(scene.workers)))


def router_cut(scene: Scene, rng: random.Random) -> Figures:
    """The router reaches no worker for 3 s; the pools reach each other."""
    return _cut(scene, rng, _network(scene).unplugged("router"))


def worker_cut(scene: Scene, rng: random.Random) -> Figures:
    """One worker reaches nobody for 3 s."""
    victim = rng.choice(list(scene.workers))
    return _cut(scene, rng, _network(scene).unplugged(victim))


def _cut(scene: Scene, rng: random.Random, cut: AbstractContextManager[None]) -> Figures:
    def disturb(figures: Figures) -> None:
        with cut:
            time.sleep(CUT)
        figures.recovery = scene.seconds_to_full_service(rng)
        figures.require(figures.recovery <= HEALED, f"no full service {HEALED:g} s after healing")

    return play_disturbed(scene, rng, disturb)


def narrow_lines(scene: Scene, rng: random.Random) -> Figures:
    """Both workers' lines lose what comes faster than 50 Mbit/s."""
    return _bad_lines(scene, rng, NARROW)


def lossy_lines(scene: Scene, rng: random.Random) -> Figures:
    """Both workers' lines lose 2 % of all packets at random and delay the others by 5 ms."""
    return _bad_lines(scene, rng, LOSSY)


def _bad_lines(scene: Scene, rng: random.Random, discipline: tuple[str, ...]) -> Figures:
    network = _network(scene)

    def disturb(figures: Figures) -> None:
        with ExitStack() as lines:
            for worker in scene.workers:
                lines.enter_context(network.bad_line(worker, *discipline))
            asks = draw(rng, 6, prompt=(700, 1500), output=(20, 40))  # much KV to move
            answers = scene.reference.answers(asks)
            streams = [scene.clients.open(ask) for ask in asks]
            scene.clients.join(streams)
            lost = sum(map(network.packets_lost, scene.workers))
        figures.compare(streams, answers)
        figures.require(lost > 0, "the lines lost nothing")
        figures.recovery = scene.seconds_to_full_service(rng)

    return play_disturbed(scene, rng, disturb)


def _network(scene: Scene) -> Network:
    assert isinstance(scene.stack, NetworkStack), "cuts are played on separate hosts"
    return scene.stack.network
