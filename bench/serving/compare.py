"""Two runs side by side: each figure, B over A, and how far chance alone moves that ratio.

The noise is a 95 % interval by bootstrap over blocks of neighbouring requests, which keeps the
queueing that ties neighbours together (Kuensch, 1989). It knows nothing of what differs between
two measurements of the same system, such as other work on the machine: repeat runs for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.serving.measures import completed, e2es, itls, meets, tpots, ttfts
from bench.serving.record import Record, Result
from planner.outcome import Slo

RESAMPLES = 200
LATENCIES = {"TTFT": ttfts, "TPOT": tpots, "ITL": itls, "E2E": e2es}
PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both runs. Latencies in seconds; ``low`` and ``high`` bound the ratio."""

    name: str
    a: float
    b: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """B over A."""
        return self.b / self.a if self.a else math.nan

    @property
    def differs(self) -> bool:
        """Whether chance alone hardly explains the ratio."""
        return self.low > 1 or self.high < 1


def compare(a: Record, b: Record) -> list[Row]:
    """The chosen runs of both, under A's SLO. Figures that either lacks are NaN."""
    rng = np.random.default_rng(0)
    sides = []
    for record in (a, b):
        figures = _figures(record, a.slo)
        results = record.chosen.results
        drawn = [figures(_resampled(results, rng)) for _ in range(RESAMPLES)]
        sides.append((figures(results), drawn))
    (exact_a, drawn_a), (exact_b, drawn_b) = sides
    with np.errstate(divide="ignore", invalid="ignore"):
        names = list(exact_a)
        ratios = np.array([[y[n] for n in names] for y in drawn_b]) / np.array(
            [[x[n] for n in names] for x in drawn_a]
        )
        low, high = np.percentile(ratios, (2.5, 97.5), axis=0)
    return [
        Row(name, exact_a[name], exact_b[name], float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    ]


def differences(a: Record, b: Record) -> list[str]:
    """Settings that the two do not share: then more than the system differs."""
    names = dict.fromkeys((*a.settings, *b.settings))
    pairs = {name: (a.settings.get(name), b.settings.get(name)) for name in names}
    return [f"{name} {left} and {right}" for name, (left, right) in pairs.items() if left != right]


def _figures(record: Record, slo: Slo) -> Callable[[Sequence[Result]], dict[str, float]]:
    """A function from requests to figures by name; the run's duration stays what it was."""
    results = record.chosen.results
    duration = max(r.ended for r in results) - min(r.sent for r in results)

    def figures(results: Sequence[Result]) -> dict[str, float]:
        done = completed(results)
        row = {
            "output tokens/s": sum(r.output_tokens for r in done) / duration,
            "goodput, requests/s": sum(meets(r, slo) for r in results) / duration,
            "completed share": len(done) / len(results),
        }
        for name, values in LATENCIES.items():
            found = values(done)
            percentiles = np.percentile(found, PERCENTS) if len(found) else [np.nan] * 3
            row |= {f"{name} p{p}": float(v) for p, v in zip(PERCENTS, percentiles, strict=True)}
        return row

    return figures


def _resampled(results: Sequence[Result], rng: np.random.Generator) -> list[Result]:
    """As many requests, drawn as blocks of about the cube root of their number."""
    count = len(results)
    length = max(1, round(count ** (1 / 3)))
    starts = rng.integers(0, count - length + 1, -(-count // length))
    return [results[start + i] for start in starts for i in range(length)][:count]
