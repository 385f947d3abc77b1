"""Workers that die and start again on the same ports of the same host."""

from __future__ import annotations

import random
import time

from tests.chaos.cuts import network
from tests.chaos.figures import Figures
from tests.chaos.line import Condition
from tests.chaos.scene import Scene, play_disturbed
from tests.stack import IDLE, eventually, scrape

LATE = 3.0  # seconds that messages are on their way, longer than it takes to be given up
MOMENT = 0.5  # seconds in which they are sent, at most
EMPTY = 10.0  # seconds that requests wait for a pool without workers
STALE = "kvferry_stale_messages_total"


def restarted_in_place(scene: Scene, rng: random.Random) -> Figures:
    """A worker is killed and comes back on its ports; no other process is started again."""

    def disturb(figures: Figures) -> None:
        victim = rng.choice(list(scene.workers))
        before = _addresses(scene, victim)
        scene.kill(victim)
        killed = time.monotonic()
        scene.restart(victim)
        figures.recovery = scene.seconds_to_full_service(rng)
        _allow_errors(figures, killed)
        figures.require(_addresses(scene, victim) == before, "it came back somewhere else")

    return play_disturbed(scene, rng, disturb)


def late_messages(scene: Scene, rng: random.Random) -> Figures:
    """A worker's last words arrive when it is dead and given up, and its successor is starting.

    They are dropped. A decode worker's, of which there are always some, are counted.
    """

    def disturb(figures: Figures) -> None:
        victim = rng.choice(list(scene.workers))
        before = _stale(scene, victim)
        with network(scene).spoilt(network(scene).leaving(victim), Condition(delay=LATE)):
            time.sleep(rng.uniform(MOMENT / 2, MOMENT))
            scene.kill(victim)
        killed = time.monotonic()
        # What is under way arrives, but no word that nobody is there any more.
        with network(scene).spoilt(network(scene).leaving(victim), Condition(cut=True)):
            scene.restart(victim)
            time.sleep(LATE)
            counted = eventually(lambda: _stale(scene, victim) > before, IDLE)
        figures.require(counted or victim == "prefill-0", "late messages were not counted")
        figures.recovery = scene.seconds_to_full_service(rng)
        _allow_errors(figures, killed)

    return play_disturbed(scene, rng, disturb)


def _allow_errors(figures: Figures, killed: float) -> None:
    """A pool that is empty for too long, because processes start slowly, costs its requests."""
    if time.monotonic() - killed > EMPTY:
        figures.allowed = frozenset({"503 unavailable", "502 worker_lost", "event worker_lost"})


def _addresses(scene: Scene, worker: str) -> list[str]:
    [row] = [row for row in scene.stack.workers() if row["id"] == worker]
    return [row["address"], row["data_address"], row["metrics"]]


def _stale(scene: Scene, victim: str) -> float:
    """Messages about what is over, dropped so far by the router and all workers but one."""
    pages = [row["metrics"] for row in scene.stack.workers() if row["id"] != victim]
    pages.append(f"{scene.stack.url}/metrics")
    return sum(scrape(page, scene.stack.client)[STALE] for page in pages)
