"""What a worker's steps took, in sums small enough for a heartbeat. Pure state, imports no torch.

The planner fits ``seconds = c · work`` with work = (1, tokens, squares) of a step of prompt chunks
and (1, context, batch) of one of decode rows; ``planner.latency`` names the numbers. Weighted least
squares needs of each step only x = work / scale and y = seconds / scale: the sums of x·xᵀ and x·y.
The scale here is the square root of the rows or tokens: one that depended on the measured time
would count quick steps for more and find less than the mean.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

from engine.batch import Batch
from protocol.messages import StepSums

WARM_UP = 5  # steps of either kind that do not count: they allocate and compile
STALL = 4.0  # times what is usual: a step that takes longer counts as that long
MEMORY = 0.9995  # share of the past that one step leaves: some two thousand of them count


class StepTimes:
    """Sums of the steps of either kind. Steps that mix both kinds are left out."""

    def __init__(self) -> None:
        self.prefill = StepSums()
        self.decode = StepSums()
        self._num_prefill = self._num_decode = 0

    def add(self, batch: Batch, seconds: float) -> None:
        """A step took ``seconds``, more than 0. A row of one token counts as a decode row."""
        tokens = squares = num_rows = context = 0
        for row in batch.rows:
            if row.num_tokens == 1:
                num_rows += 1
                context += row.end
            else:
                tokens += row.num_tokens
                squares += row.end**2 - row.start**2
        if tokens and not num_rows:
            self._num_prefill += 1
            if self._num_prefill > WARM_UP:
                self.prefill = _with_size(self.prefill, (1, tokens, squares), seconds, tokens)
        elif num_rows and not tokens:
            self._num_decode += 1
            if self._num_decode > WARM_UP:
                self.decode = _with_size(self.decode, (1, context, num_rows), seconds, num_rows)


def _with_size(
    sums: StepSums, work: tuple[float, float, float], seconds: float, size: int
) -> StepSums:
    """The sums after a step of ``size`` rows or tokens; a stall does not count in full."""
    if sums.count:  # x is work / √size, so totals[0] is the sum of seconds / size
        each = sums.totals[0] / sums.count
        usual = sums.totals[0] / sums.products[0] + size * each
        seconds = min(seconds, STALL * usual)
    return with_step(sums, work, seconds, math.sqrt(size))


def with_step(
    sums: StepSums,
    work: tuple[float, float, float],
    seconds: float,
    scale: float,
    memory: float = MEMORY,
) -> StepSums:
    """The sums after one more step; ``memory`` is what it leaves of the earlier ones."""
    x, y = [term / scale for term in work], seconds / scale
    products = (a * b for a, b in combinations_with_replacement(x, 2))
    return StepSums(
        count=memory * sums.count + 1,
        products=tuple(
            memory * old + new for old, new in zip(sums.products, products, strict=True)
        ),
        totals=tuple(memory * old + term * y for old, term in zip(sums.totals, x, strict=True)),
    )
