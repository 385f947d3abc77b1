"""What a run gave: every request's TTFT and TPOT, all intervals between tokens, and an SLO's view.

Memory is 16 bytes a request, so that any SLO may be asked of a run afterwards; intervals between
tokens, of which there are many more, are counted in buckets 2 % wide.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKETS_PER_E = 50  # buckets as wide as 1/50 of their value
FLOOR = 1e-6  # seconds: shorter intervals share a bucket


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds that TTFT and TPOT may take in ``attainment`` of all requests, both at once."""

    ttft: float
    tpot: float
    attainment: float = 0.9


class Histogram:
    """Weighted durations in logarithmic buckets: percentiles within 1 %."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, seconds: float, weight: int = 1) -> None:
        """Count a duration ``weight`` times."""
        bucket = math.floor(math.log(max(seconds, FLOOR)) * BUCKETS_PER_E)
        self._counts[bucket] = self._counts.get(bucket, 0) + weight

    def percentile(self, percent: float) -> float:
        """Seconds below which ``percent`` of the weight lies; NaN when empty."""
        wanted = sum(self._counts.values()) * percent / 100
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return math.exp((bucket + 0.5) / BUCKETS_PER_E)
        return math.nan


class Outcome:
    """The served requests of one run, and how many never could be."""

    def __init__(self) -> None:
        self._ttft, self._tpot = array("d"), array("d")
        self.itl = Histogram()
        self.num_rejected = 0  # whose KV fits no worker
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of those, found in prefill's prefix cache

    def add(self, ttft: float, tpot: float) -> None:
        """A request has ended. Seconds; a single output token has a TPOT of zero."""
        self._ttft.append(ttft)
        self._tpot.append(tpot)

    @property
    def ttft(self) -> NDArray[np.float64]:
        """Seconds to the first token of every served request, in order of their ends."""
        return np.asarray(self._ttft)

    @property
    def tpot(self) -> NDArray[np.float64]:
        """Mean seconds between the tokens of every served request, in order of their ends."""
        return np.asarray(self._tpot)

    @property
    def num_requests(self) -> int:
        """Requests that ended or were rejected."""
        return len(self._ttft) + self.num_rejected

    def num_missed(self, slo: Slo) -> int:
        """Of them, those that did not meet both deadlines."""
        met = (self.ttft <= slo.ttft) & (self.tpot <= slo.tpot)
        return self.num_requests - int(met.sum())

    def attainment(self, slo: Slo) -> float:
        """Share of all requests, rejected ones included, that met both deadlines."""
        total = self.num_requests
        return (total - self.num_missed(slo)) / max(1, total)

    def figures(self) -> dict[str, float]:
        """Percentiles, in seconds, by name."""
        figures: dict[str, float] = {}
        for percent in (50, 90, 99):
            for name, values in (("ttft", self.ttft), ("tpot", self.tpot)):
                value = np.percentile(values, percent) if len(values) else math.nan
                figures[f"{name}_p{percent}"] = float(value)
            figures[f"itl_p{percent}"] = self.itl.percentile(percent)
        return figures
