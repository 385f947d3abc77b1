"""What the router did in the last ten minutes: latency percentiles, rates, goodput.

Time is cut into slots of five seconds. A slot holds counts and sparse histograms with buckets 2 %
apart, so that a percentile is within 1 % and a slot's size does not grow with its tokens (the
idea of DDSketch: Masson, Rim and Lee, VLDB 2019). Only goodput needs each sequence's own pair
of times: 8 bytes each. The clock is passed in.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SLOT = 5.0  # seconds
NUM_SLOTS = 120  # ten minutes
WINDOW = 12  # slots of the present figures, the one that is filling included
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
BUCKETS = 1 / math.log(1.02)  # per factor e
SHORTEST = 1e-6  # seconds; less is counted as this


@dataclass(frozen=True, slots=True)
class Objective:
    """The service level objective, in seconds: a good sequence is within both."""

    time_to_first_token: float
    time_per_output_token: float


class Histogram:
    """Counts of times by bucket."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a time ``count`` times."""
        bucket = math.floor(math.log(max(seconds, SHORTEST)) * BUCKETS)
        self.counts[bucket] = self.counts.get(bucket, 0) + count


def percentiles(histograms: Iterable[Histogram]) -> dict[str, float] | None:
    """Seconds at ``PERCENTILES`` of all times in the histograms (nearest rank); None: no times."""
    merged: dict[int, int] = {}
    for histogram in histograms:
        for bucket, count in histogram.counts.items():
            merged[bucket] = merged.get(bucket, 0) + count
    total = sum(merged.values())
    if total == 0:
        return None
    found: dict[str, float] = {}
    wanted = deque((name, math.ceil(share * total)) for name, share in PERCENTILES.items())
    passed = 0
    for bucket in sorted(merged):
        passed += merged[bucket]
        while wanted and wanted[0][1] <= passed:
            found[wanted.popleft()[0]] = round(math.exp((bucket + 0.5) / BUCKETS), 6)
    return found


@dataclass(slots=True)
class Slot:
    """Five seconds."""

    number: int
    requests: int = 0  # sequences that arrived
    failed: int = 0  # sequences that ended with an error
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)
    served: array[float] = field(default_factory=lambda: array("f"))  # ttft, tpot, ttft, ...

    def good(self, objective: Objective) -> int:
        """Sequences that ended well and were within the objective."""
        ttft, tpot = objective.time_to_first_token, objective.time_per_output_token
        pairs = zip(self.served[::2], self.served[1::2], strict=True)
        return sum(first <= ttft and each <= tpot for first, each in pairs)


class Activity:
    """The present and the last ten minutes. Times are seconds of one monotonic clock."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._slots: deque[Slot] = deque([Slot(int(now // SLOT))], maxlen=NUM_SLOTS)

    def arrived(self, now: float) -> None:
        """A sequence arrived."""
        self._slot(now).requests += 1

    def first_token(self, seconds: float, num_prompt_tokens: int, now: float) -> None:
        """A sequence's first token came ``seconds`` after its request."""
        slot = self._slot(now)
        slot.ttft.add(seconds)
        slot.prompt_tokens += num_prompt_tokens

    def tokens(self, count: int, gap: float | None, now: float) -> None:
        """A sequence got tokens, each ``gap`` seconds after the one before; None: its first."""
        slot = self._slot(now)
        slot.output_tokens += count
        if gap is not None:
            slot.itl.add(gap, count)

    def served(self, ttft: float, tpot: float | None, now: float) -> None:
        """A sequence ended well; ``tpot`` is None if it had but one token."""
        slot = self._slot(now)
        if tpot is not None:
            slot.tpot.add(tpot)
        slot.served.extend((ttft, tpot or 0.0))

    def failed(self, now: float) -> None:
        """A sequence ended with an error."""
        self._slot(now).failed += 1

    def present(self, objective: Objective, now: float) -> dict[str, Any]:
        """The last minute."""
        newest = self._slot(now).number
        slots = [slot for slot in self._slots if slot.number > newest - WINDOW]
        begin = max(self._started, (newest - WINDOW + 1) * SLOT)
        seconds = max(now - begin, 1.0)
        good = sum(slot.good(objective) for slot in slots)
        ended = sum(len(slot.served) // 2 + slot.failed for slot in slots)
        return {
            "seconds": round(seconds, 3),
            "time_to_first_token": percentiles(slot.ttft for slot in slots),
            "time_per_output_token": percentiles(slot.tpot for slot in slots),
            "inter_token_latency": percentiles(slot.itl for slot in slots),
            "rates": _rates(slots, seconds),
            "goodput": {
                "time_to_first_token": objective.time_to_first_token,
                "time_per_output_token": objective.time_per_output_token,
                "requests_per_second": round(good / seconds, 3),
                "attainment": round(good / ended, 4) if ended else None,
            },
        }

    def history(self, objective: Objective, after: int, now: float) -> list[dict[str, Any]]:
        """One point for each full slot whose number is above ``after``.

        All of them when ``after`` is yet to come: then it is of another router, before this one.
        """
        newest = self._slot(now).number
        known = {slot.number: slot for slot in self._slots}
        first = max(int(self._started // SLOT), newest - NUM_SLOTS + 1)
        if after < newest:
            first = max(first, after + 1)
        return [
            _point(known.get(number, Slot(number)), objective, newest)
            for number in range(first, newest)
        ]

    def _slot(self, now: float) -> Slot:
        slot = self._slots[-1]
        number = int(now // SLOT)
        if slot.number != number:
            slot = Slot(number)
            self._slots.append(slot)
        return slot


def _rates(slots: Sequence[Slot], seconds: float) -> dict[str, float]:
    def rate(total: int) -> float:
        return round(total / seconds, 3)

    return {
        "requests": rate(sum(slot.requests for slot in slots)),
        "failed": rate(sum(slot.failed for slot in slots)),
        "prompt_tokens": rate(sum(slot.prompt_tokens for slot in slots)),
        "output_tokens": rate(sum(slot.output_tokens for slot in slots)),
    }


def _point(slot: Slot, objective: Objective, newest: int) -> dict[str, Any]:
    return {
        "slot": slot.number,
        "age": (newest - slot.number) * SLOT,
        "time_to_first_token": percentiles([slot.ttft]),
        "inter_token_latency": percentiles([slot.itl]),
        "goodput": round(slot.good(objective) / SLOT, 3),
        **_rates([slot], SLOT),
    }
