"""Processes that die, stand still, restart or leave, while clients stream."""

from __future__ import annotations

import random
import time

from tests.chaos.figures import Figures
from tests.chaos.scene import Scene, play_disturbed

DETECTION = 1.0  # seconds until a killed worker is given up
PREFILLS = 1.5  # times a fresh prefill, to compute a stream's KV elsewhere


def prefill_killed(scene: Scene, rng: random.Random) -> Figures:
    """``kill -9`` of a prefill worker."""
    return _killed(scene, rng, "prefill")


def decode_killed(scene: Scene, rng: random.Random) -> Figures:
    """``kill -9`` of a decode worker. How long its streams pause is held against an aim."""
    figures = _killed(scene, rng, "decode")
    prefill = scene.seconds_to_first_token(rng, figures.longest_gap[1])
    figures.aim = DETECTION + PREFILLS * prefill
    return figures


def _killed(scene: Scene, rng: random.Random, role: str) -> Figures:
    return play_disturbed(scene, rng, lambda _: scene.kill(rng.choice(scene.pool(role))))


def worker_frozen(scene: Scene, rng: random.Random) -> Figures:
    """A worker stands still for up to 4 s, longer or shorter than it takes to be given up."""

    def disturb(figures: Figures) -> None:
        with scene.frozen(rng.choice(list(scene.workers))):
            time.sleep(rng.uniform(0.2, 4.0))
        figures.recovery = scene.seconds_to_full_service(rng)

    return play_disturbed(scene, rng, disturb)


def worker_restarted(scene: Scene, rng: random.Random) -> Figures:
    """A worker is killed and at once started again on the same address."""

    def disturb(figures: Figures) -> None:
        victim = rng.choice(list(scene.workers))
        scene.kill(victim)
        scene.restart(victim)
        figures.recovery = scene.seconds_to_full_service(rng)

    return play_disturbed(scene, rng, disturb)


def router_killed(scene: Scene, rng: random.Random) -> Figures:
    """The router is killed and started again: streams are cut, never ended as if complete."""

    def disturb(figures: Figures) -> None:
        figures.allowed = frozenset({"cut", "unreachable"})
        scene.kill("router")
        time.sleep(rng.uniform(0, 3.0))
        scene.restart("router")
        figures.recovery = scene.seconds_to_full_service(rng)

    return play_disturbed(scene, rng, disturb)


def worker_drained(scene: Scene, rng: random.Random) -> Figures:
    """A worker is told to leave: it ends with status 0, and no client notices."""

    def disturb(figures: Figures) -> None:
        status = scene.drain(rng.choice(list(scene.workers)))
        figures.require(status == 0, f"the drained worker ended with status {status}")

    return play_disturbed(scene, rng, disturb)
