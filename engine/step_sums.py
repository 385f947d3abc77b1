"""What a worker's steps took, in sums small enough for a heartbeat. Pure state, imports no torch.

The planner fits ``seconds = c · work`` with work = (1, tokens, squares) of a step of prompt chunks
and (1, context, batch) of one of decode rows; ``planner.latency`` names the numbers. Weighted least
squares needs of each step only x = work / scale and y = seconds / scale: the sums of x·xᵀ and x·y,
and that of y·y for what the fit leaves unexplained. The scale here is the square root of the rows
or tokens: one that depended on the measured time would count quick steps for more and find less
than the mean.

Decode steps are told in spells. What slows steps down (others on the same cores, clocks) often
lasts longer than one of them, and a request's TPOT is a mean over many: it varies as spells do.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

from engine.batch import Batch
from protocol.messages import StepSums

WARM_UP = 5  # steps of either kind that do not count: they allocate and compile
STALL = 4.0  # times what is usual: a step that takes longer counts as that long
MEMORY = 0.9995  # share of the past that one step leaves: some two thousand of them count
SPELL = 32  # decode steps that are told as one


class StepTimes:
    """Sums of the steps of either kind. Steps that mix both kinds are left out."""

    def __init__(self) -> None:
        self.prefill = StepSums()
        self.decode = StepSums()
        self._num_prefill = self._num_decode = 0
        self._spell = (0, 0, 0, 0.0)  # steps, context, rows and seconds of the one under way

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
                seconds = _without_stall(self.prefill, seconds, tokens)
                scale = math.sqrt(tokens)
                self.prefill = with_steps(self.prefill, (1, tokens, squares), seconds, scale)
        elif num_rows and not tokens:
            self._num_decode += 1
            if self._num_decode > WARM_UP:
                self._add_to_spell(context, num_rows, seconds)

    def _add_to_spell(self, context: int, num_rows: int, seconds: float) -> None:
        steps, all_context, all_rows, all_seconds = self._spell
        work = steps + 1, all_context + context, all_rows + num_rows
        all_seconds += _without_stall(self.decode, seconds, num_rows)
        self._spell = (*work, all_seconds)
        if work[0] == SPELL:
            self._spell = (0, 0, 0, 0.0)
            scale = math.sqrt(work[2])
            self.decode = with_steps(self.decode, work, all_seconds, scale, MEMORY**SPELL)


def _without_stall(sums: StepSums, seconds: float, size: int) -> float:
    """What counts of the time of a step of ``size`` rows or tokens."""
    if not sums.count:
        return seconds
    each = sums.totals[0] / sums.count  # x is work / √size, so this is a mean of seconds / size
    return min(seconds, STALL * (sums.totals[0] / sums.products[0] + size * each))


def with_steps(
    sums: StepSums,
    work: tuple[float, float, float],
    seconds: float,
    scale: float,
    memory: float = MEMORY,
) -> StepSums:
    """The sums after ``work[0]`` more steps, which are told as one.

    ``memory`` is what they leave of the earlier ones.
    """
    x, y = [term / scale for term in work], seconds / scale
    products = (a * b for a, b in combinations_with_replacement(x, 2))
    return StepSums(
        count=memory * sums.count + work[0],
        products=tuple(
            memory * old + new for old, new in zip(sums.products, products, strict=True)
        ),
        totals=tuple(memory * old + term * y for old, term in zip(sums.totals, x, strict=True)),
        squares=memory * sums.squares + y * y,
    )
