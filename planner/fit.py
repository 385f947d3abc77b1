"""Fits the latency model to timed steps: least squares of relative errors, no negative term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.latency import DecodeFit, LinearLatency, PrefillFit
from protocol.errors import ConfigError

NUM_TERMS = 3


@dataclass(frozen=True, slots=True)
class StepSample:
    """One timed step, of prompt chunks or of decode rows; ``planner.latency`` names the numbers."""

    tokens: int
    squares: int
    batch: int
    context: int
    seconds: float


def fit_latency(samples: Sequence[StepSample]) -> LinearLatency:
    """The model of least relative error. Steps that mix chunks and rows are left out.

    Raises ConfigError when fewer than three different steps of either kind were timed.
    """
    prefill = [s for s in samples if s.tokens and not s.batch]
    decode = [s for s in samples if s.batch and not s.tokens]
    fixed, per_token, per_square = _solve(
        "prefill", prefill, [(s.tokens, s.squares) for s in prefill]
    )
    prefill_fit = PrefillFit(fixed=fixed, per_token=per_token, per_square=per_square)
    fixed, per_context, per_row = _solve("decode", decode, [(s.context, s.batch) for s in decode])
    decode_fit = DecodeFit(fixed=fixed, per_context=per_context, per_row=per_row)
    return LinearLatency(prefill=prefill_fit, decode=decode_fit)


def relative_errors(latency: LinearLatency, samples: Sequence[StepSample]) -> NDArray[np.float64]:
    """``predicted / measured - 1`` of every step, shape [len(samples)]."""
    predicted = [latency.step_seconds(s.tokens, s.squares, s.batch, s.context) for s in samples]
    errors: NDArray[np.float64] = np.array(predicted) / np.array([s.seconds for s in samples]) - 1
    return errors


def _solve(
    kind: str, samples: Sequence[StepSample], work: Sequence[tuple[int, int]]
) -> tuple[float, float, float]:
    """Coefficients of (1, work[0], work[1]); the most negative is set to zero until none is."""
    if len(set(work)) < NUM_TERMS:
        raise ConfigError(f"a {kind} fit needs {NUM_TERMS} different steps, got {len(set(work))}")
    seconds = np.asarray([s.seconds for s in samples])
    if not (seconds > 0).all():
        raise ConfigError(f"a {kind} step took no time")
    terms = np.column_stack([np.ones(len(work)), np.asarray(work, dtype=np.float64)])
    scale = terms.max(axis=0)  # columns of one magnitude: their squares span many otherwise
    weighted = terms / scale / seconds[:, None]
    kept = list(range(NUM_TERMS))
    solution = np.zeros(NUM_TERMS)
    while kept:
        found = np.linalg.lstsq(weighted[:, kept], np.ones(len(work)), rcond=None)[0]
        if (found >= 0).all():
            solution[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return float(solution[0]), float(solution[1]), float(solution[2])
