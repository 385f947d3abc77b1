"""All scenarios, and where each plays. What each promises, its function says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos import cancels, cuts, deadlines, deaths, load, restarts, settings, stuck
from tests.chaos.figures import Figures
from tests.chaos.scene import Scene

Play = Callable[[Scene, random.Random], Figures]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Plays on a scene of its setting, and leaves it whole."""

    name: str
    setting: settings.Setting
    _play: Play

    def play(self, scene: Scene, seed: int) -> Figures:
        """Play once; prompts and moments follow from the seed, and differ between scenarios."""
        return self._play(scene, random.Random(f"{self.name} {seed}"))


def _all(setting: settings.Setting, prefix: str, *plays: Play) -> list[Scenario]:
    return [Scenario(prefix + p.__name__.replace("_", "-"), setting, p) for p in plays]


SCENARIOS: list[Scenario] = [
    *_all(
        settings.pools,
        "",
        deaths.prefill_killed,
        deaths.decode_killed,
        deaths.worker_frozen,
        deaths.worker_restarted,
        deaths.router_killed,
        deaths.worker_drained,
    ),
    *_all(
        settings.hosts,
        "",
        cuts.pools_cut,
        cuts.router_cut,
        cuts.worker_cut,
        cuts.narrow_lines,
        cuts.lossy_lines,
        cuts.very_lossy_lines,
        cuts.slow_lines,
        restarts.restarted_in_place,
        restarts.late_messages,
        stuck.thread_stuck,
    ),
    *_all(
        settings.small,
        "cancel-",
        cancels.on_arrival,
        cancels.in_router_queue,
        cancels.in_prefill_queue,
        cancels.in_a_chunk,
        cancels.waiting_for_a_grant,
        cancels.in_decode_queue,
        cancels.while_decoding,
        cancels.while_decode_stands_still,
        cancels.while_prefill_stands_still,
    ),
    *_all(
        settings.small,
        "",
        deadlines.deadlines_pass,
        load.decode_overloaded,
        load.connections,
        load.cancel_flood,
        load.idle,
    ),
]
