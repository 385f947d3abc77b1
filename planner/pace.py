"""How much longer or shorter one simulated worker's steps take than the latency model says.

Factors are drawn, with the worker's seed, from log-normal distributions of mean 1 and the latency
model's variation: what slows steps down (others on the same cores, memory, clocks) multiplies their
time. A step with prompt chunks draws its own. Decode steps share one for a spell, as they were
measured (``engine.step_sums``): drawn for each alone, they would cancel out over the tokens of a
request.
"""

from __future__ import annotations

import math
from random import Random

from engine.step_sums import SPELL
from planner.latency import Variation


class Pace:
    """The present ``factor``; ``begin`` and ``end`` frame every run of steps."""

    def __init__(self, variation: Variation, seed: int) -> None:
        self._random = Random(seed)
        self._prefill = _sigma(variation.prefill_variation)
        self._decode = _sigma(variation.decode_variation)
        self._spell, self._left = 1.0, 0  # factor and steps of the present spell
        self._in_spell = False
        self.factor = 1.0

    def begin(self, prompts: bool, steps: int) -> int:
        """Up to ``steps`` steps are to run, with ``prompts`` in them or not.

        Returns how many of them have the same factor.
        """
        self._in_spell = bool(self._decode) and not prompts
        if not self._in_spell:
            self.factor = self._draw(self._prefill) if prompts else 1.0
            return steps
        if not self._left:
            self._spell, self._left = self._draw(self._decode), SPELL
        self.factor = self._spell
        return min(steps, self._left)

    def end(self, steps: int) -> None:
        """So many of them have run."""
        if self._in_spell:
            self._left -= steps

    def _draw(self, sigma: float) -> float:
        return self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else 1.0


def _sigma(variation: float) -> float:
    """The log's standard deviation where the value's is ``variation`` times its mean."""
    return math.sqrt(math.log1p(variation * variation))
