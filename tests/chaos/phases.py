"""The phases of a request's life on the ``small`` setting: who asks what to get into one, and how
to see that it is reached.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.asks import Ask, draw
from tests.chaos.clients import Stream
from tests.chaos.scene import Scene
from tests.stack import scrape

RUNNING = "kvferry_num_requests_running"
WAITING = "kvferry_num_requests_waiting"


@dataclass(frozen=True, slots=True)
class Phase:
    """``reached(scene, streams)`` says whether a request of ``streams`` is in it."""

    count: int  # of requests
    prompt: tuple[int, int]  # tokens, from and to
    output: tuple[int, int]
    reached: Callable[[Scene, list[Stream]], bool]

    def asks(self, rng: random.Random) -> list[Ask]:
        """What to ask for to get there."""
        return draw(rng, self.count, prompt=self.prompt, output=self.output)


def _router_waits(scene: Scene, _: list[Stream]) -> bool:
    return scrape(f"{scene.stack.url}/metrics", scene.stack.client)[WAITING] > 0


def _prefill_waits(scene: Scene, _: list[Stream]) -> bool:
    return scene.stack.metrics("prefill")[WAITING] > 0


def _prefill_runs(scene: Scene, streams: list[Stream]) -> bool:
    return scene.stack.metrics("prefill")[RUNNING] > 0 and not any(s.token_ids for s in streams)


def _decode_waits(scene: Scene, _: list[Stream]) -> bool:
    return scene.stack.metrics("decode")[WAITING] > 0


def _decode_runs(_: Scene, streams: list[Stream]) -> bool:
    return all(len(stream.token_ids) > 1 for stream in streams)


# More than the decode worker has room for.
ROUTER_QUEUE = Phase(14, (4, 60), (300, 400), _router_waits)
# The prefill worker takes one at a time.
PREFILL_QUEUE = Phase(2, (350, 400), (10, 60), _prefill_waits)
# Prefill computes prompts in many steps, before any token.
CHUNK = Phase(2, (800, 900), (10, 100), _prefill_runs)
# More are handed off than the running batch takes.
DECODE_QUEUE = Phase(14, (4, 12), (300, 400), _decode_waits)
# All are in the midst of their streams.
DECODING = Phase(4, (4, 60), (190, 200), _decode_runs)
