"""How long one engine step takes in the mean, from what it computes. Seconds and tokens everywhere.

A step computes prompt chunks, decode rows or both. Its work is four numbers:

    tokens   prompt tokens computed, the sum of the chunks' lengths
    squares  the sum of end² - start² over the chunks [start, end) of their prompts
    batch    decode rows, one token each
    context  the sum of the decode rows' context lengths

A whole prompt of L tokens has squares L², and its chunks' squares add up to L², so that chunking
changes neither the linear nor the quadratic part of a prompt's cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PrefillFit(BaseModel):
    """``fixed + per_token·ΣL + per_square·ΣL²``, the form of DistServe's profiler (OSDI '24)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed: Coefficient
    per_token: Coefficient
    per_square: Coefficient

    def seconds(self, tokens: float, squares: float) -> float:
        """Time of a step that computes only prompt tokens."""
        return self.fixed + self.per_token * tokens + self.per_square * squares


class DecodeFit(BaseModel):
    """``fixed + per_context·Σcontext + per_row·batch``: weights, KV and per-row work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed: Coefficient
    per_context: Coefficient
    per_row: Coefficient

    def seconds(self, batch: float, context: float) -> float:
        """Time of a step that computes only decode rows."""
        return self.fixed + self.per_context * context + self.per_row * batch


class Variation(BaseModel):
    """How much times of equal work differ: standard deviations over means (``planner.pace``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill_variation: Coefficient = 0.0  # of single steps
    decode_variation: Coefficient = 0.0  # of spells of steps


class LinearLatency(Variation):
    """Both fits. A mixed step reads the weights once.

    Its prompt chunks cost what they cost alone, at least the decode step's fixed part; decode rows
    add their own part. This favours colocation: chunks carry decode rows at no second fixed cost.
    """

    kind: Literal["linear"] = "linear"
    prefill: PrefillFit
    decode: DecodeFit

    @model_validator(mode="after")
    def _takes_time(self) -> Self:
        if self.prefill.seconds(1, 1) <= 0 or self.decode.seconds(1, 1) <= 0:
            raise ValueError("a step must take time: all coefficients of a fit are zero")
        return self

    def step_seconds(self, tokens: int, squares: int, batch: int, context: float) -> float:
        """Time of one step; ``batch`` or ``tokens`` may be zero, not both."""
        if not tokens:
            return self.decode.seconds(batch, context)
        alone = self.prefill.seconds(tokens, squares)
        if not batch:
            return alone
        rows = self.decode.per_context * context + self.decode.per_row * batch
        return max(alone, self.decode.fixed) + rows


class TableLatency(Variation):
    """Measured points, interpolated linearly, extended past the last by the last slope.

    ``prefill[i]`` is the time of ``tokens[i]`` prompt tokens from position 0. ``decode[i][j]`` is
    that of ``batches[i]`` rows of ``contexts[j]`` tokens each. ``per_history`` is the time for each
    pair of a chunk's token and an earlier one of its prompt, which tables of whole prompts leave
    out. A mixed step costs its chunks, or the smallest decode step if that is more, and what its
    rows cost beyond that smallest step.
    """

    kind: Literal["table"] = "table"
    tokens: tuple[int, ...]
    prefill: tuple[Seconds, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    decode: tuple[tuple[Seconds, ...], ...]
    per_history: Coefficient = 0.0

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        for name in ("tokens", "batches", "contexts"):
            axis = getattr(self, name)
            if not axis or axis[0] < 0 or any(a >= b for a, b in pairwise(axis)):
                raise ValueError(f"{name} must be increasing and not empty")
        if len(self.prefill) != len(self.tokens):
            raise ValueError(f"prefill has {len(self.prefill)} times for {len(self.tokens)} tokens")
        if [len(row) for row in self.decode] != [len(self.contexts)] * len(self.batches):
            raise ValueError("decode must have a row for each batch, a time for each context")
        return self

    def step_seconds(self, tokens: int, squares: int, batch: int, context: float) -> float:
        """Time of one step; ``batch`` or ``tokens`` may be zero, not both."""
        if not tokens:
            return self._decode_seconds(batch, context)
        history = max(0, squares - tokens * tokens) / 2
        alone = interpolate(self.tokens, self.prefill, tokens) + self.per_history * history
        if not batch:
            return alone
        smallest = self.decode[0][0]
        return max(alone, smallest) + max(0.0, self._decode_seconds(batch, context) - smallest)

    def _decode_seconds(self, batch: int, context: float) -> float:
        each = context / batch
        by_batch = [interpolate(self.contexts, row, each) for row in self.decode]
        return interpolate(self.batches, by_batch, batch)


Latency = Annotated[LinearLatency | TableLatency, Field(discriminator="kind")]


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through (xs, ys), ``xs`` increasing: flat before it, sloped after it."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    high = min(bisect_right(xs, x), len(xs) - 1)
    low = high - 1
    share = (x - xs[low]) / (xs[high] - xs[low])
    return ys[low] + share * (ys[high] - ys[low])
