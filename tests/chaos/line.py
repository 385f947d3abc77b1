"""What a line between two hosts does to each packet: pure state, with clock and chance passed in.

A switch of its own instead of the kernel's ``netem``, which many machines do not have.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Condition:
    """How bad a line is, in one direction. The default is a perfect one."""

    cut: bool = False
    loss: float = 0.0  # share of all packets
    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds that a packet takes longer or shorter, at most
    overtaking: float = 0.0  # share of packets that are not delayed, and so overtake others
    rate: float = math.inf  # bytes a second
    queue: float = 0.01  # seconds that a packet waits for its turn; who would wait longer is lost


class Line:
    """One direction of a line."""

    def __init__(self, condition: Condition, rng: random.Random) -> None:
        self._condition = condition
        self._rng = rng
        self._free = 0.0  # when all that was sent has left the queue
        self._last = 0.0  # when the last delayed packet arrives

    def arrival(self, now: float, size: int) -> float | None:
        """When a packet of ``size`` bytes that is sent now arrives; None if it is lost.

        Delayed packets arrive in the order in which they were sent.
        """
        condition = self._condition
        leaves = max(now, self._free)
        too_long = leaves - now > condition.queue
        if condition.cut or too_long or self._rng.random() < condition.loss:
            return None
        self._free = leaves + size / condition.rate
        if self._rng.random() < condition.overtaking:
            return self._free
        jitter = self._rng.uniform(-condition.jitter, condition.jitter)
        self._last = max(self._last, self._free + condition.delay + jitter)
        return self._last
