"""Fits the latency model to timed steps: weighted least squares, no negative term.

Steps come one by one (``kvferry profile``: relative errors count), or as the sums that running
workers tell with their load (``engine.step_sums``); both end in the same normal equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.step_sums import with_steps
from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.observed import Row, link_latencies_of, overhead_of
from planner.profile import Link, WorkerProfile
from protocol.errors import ConfigError
from protocol.messages import StepSums

NUM_TERMS = 3
FEWEST_STEPS = 20  # of either kind, for a fit to running workers
UNTOLD = 1e-9  # smallest share of the strongest direction that tells anything
USUAL_LINK = Link(bytes_per_second=1.25e9, latency=2e-3)  # 10 Gb/s


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
    return _model(
        _sums("prefill", prefill, [(1, s.tokens, s.squares) for s in prefill]),
        _sums("decode", decode, [(1, s.context, s.batch) for s in decode]),
    )


def observed_profile(
    workers: Sequence[dict[str, Any]], rows: Sequence[Row] = (), link: Link = USUAL_LINK
) -> WorkerProfile:
    """What running workers tell of themselves: rows of ``GET /admin/workers``, taken as alike.

    ``rows`` of ``GET /admin/workload`` tell what a request takes beside queues and steps: its
    overhead, and the link's latencies. The link's bandwidth is not measured. Raises ConfigError
    while too few steps have been timed.
    """
    if not workers:
        raise ConfigError("there is no worker to learn the latency model from")
    prefill = _together([worker["load"]["prefill_steps"] for worker in workers])
    decode = _together([worker["load"]["decode_steps"] for worker in workers])
    for kind, sums in (("prefill", prefill), ("decode", decode)):
        if sums.count < FEWEST_STEPS:
            raise ConfigError(
                f"the workers have timed {sums.count:.0f} {kind} steps: a latency model needs "
                f"{FEWEST_STEPS}"
            )
    block_size = workers[0]["block_size"]
    kv_bytes_per_token = max(1, workers[0]["block_wire_bytes"] // block_size)
    chunk = workers[0]["load"]["max_num_batched_tokens"]
    latencies = link_latencies_of(rows, chunk, kv_bytes_per_token / link.bytes_per_second)
    return WorkerProfile(
        name="observed",
        latency=_model(prefill, decode),
        kv_tokens=min(worker["load"]["total_blocks"] for worker in workers) * block_size,
        kv_bytes_per_token=kv_bytes_per_token,
        link=link.model_copy(update={"latencies": latencies}),
        overhead=overhead_of(rows),
    )


def relative_errors(latency: LinearLatency, samples: Sequence[StepSample]) -> NDArray[np.float64]:
    """``predicted / measured - 1`` of every step, shape [len(samples)]."""
    predicted = [latency.step_seconds(s.tokens, s.squares, s.batch, s.context) for s in samples]
    errors: NDArray[np.float64] = np.array(predicted) / np.array([s.seconds for s in samples]) - 1
    return errors


def _sums(
    kind: str, samples: Sequence[StepSample], work: Sequence[tuple[int, int, int]]
) -> StepSums:
    if len(set(work)) < NUM_TERMS:
        raise ConfigError(f"a {kind} fit needs {NUM_TERMS} different steps, got {len(set(work))}")
    sums = StepSums()
    for sample, terms in zip(samples, work, strict=True):
        if sample.seconds <= 0:
            raise ConfigError(f"a {kind} step took no time")
        relative = sample.seconds  # as the scale: errors count by their share of the time
        sums = with_steps(sums, terms, sample.seconds, relative, memory=1.0)
    return sums


def _together(rows: Sequence[dict[str, Any]]) -> StepSums:
    def added(name: str) -> tuple[float, ...]:
        return tuple(map(sum, zip(*(row[name] for row in rows), strict=True)))

    count, squares = (sum(row[name] for row in rows) for name in ("count", "squares"))
    products, totals = added("products"), added("totals")
    return StepSums(count=count, products=products, totals=totals, squares=squares)


def _model(prefill: StepSums, decode: StepSums) -> LinearLatency:
    (fixed, per_token, per_square), prefill_variation = _solve(prefill)
    prefill_fit = PrefillFit(fixed=fixed, per_token=per_token, per_square=per_square)
    (fixed, per_context, per_row), decode_variation = _solve(decode)
    decode_fit = DecodeFit(fixed=fixed, per_context=per_context, per_row=per_row)
    return LinearLatency(
        prefill=prefill_fit,
        decode=decode_fit,
        prefill_variation=prefill_variation,
        decode_variation=decode_variation,
    )


def _solve(sums: StepSums) -> tuple[tuple[float, float, float], float]:
    """Coefficients of the three terms; the most negative is set to zero until none is.

    Where steps were too alike to tell terms apart, the smallest solution shares the time out. With
    them comes the variation: the root of the residuals' sum of squares over that of the fitted
    times, each step divided by its scale.
    """
    products = np.zeros((NUM_TERMS, NUM_TERMS))
    products[np.triu_indices(NUM_TERMS)] = sums.products
    products = np.triu(products) + np.triu(products, 1).T
    scale = np.sqrt(products.diagonal())  # terms of one magnitude: they span many otherwise
    scaled, totals = products / np.outer(scale, scale), np.array(sums.totals) / scale
    kept = list(range(NUM_TERMS))
    solution = np.zeros(NUM_TERMS)
    while kept:
        found = np.linalg.lstsq(scaled[np.ix_(kept, kept)], totals[kept], rcond=UNTOLD)[0]
        if (found >= 0).all():
            solution[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    fitted = float(solution @ products @ solution)
    residual = max(0.0, sums.squares - 2 * float(solution @ sums.totals) + fitted)
    variation = math.sqrt(residual / fitted) if fitted else 0.0
    return (float(solution[0]), float(solution[1]), float(solution[2])), variation
