"""The highest request rate at which a placement keeps an SLO, by bisection over simulations.

Goodput is DistServe's: the rate that at least the SLO's share of requests survives with both
deadlines met (Zhong et al., OSDI '24). Rates lie on one logarithmic grid, so that a simulation
answers for every SLO that asks about the same rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from planner.outcome import Outcome, Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import Detail, simulate
from planner.workload import Request, at_rate, rate_of

GRID = 1.03  # between two neighbouring rates
SLOWEST = math.ceil(math.log(1000, GRID))  # steps below the first guess until an SLO is hopeless
FASTEST = math.ceil(math.log(30, GRID))  # steps above it until a trace is too short to tell
USUAL_LOAD = 0.6  # of prefill's capacity at goodput: where the search begins
ROUNDING = 1e-6  # of steps: rates of the grid come back as powers of GRID
FIRST_STEP = 4  # of the search for a rate that meets an SLO and one that does not


class Candidate:
    """One placement under one workload, at any rate; remembers what it has simulated."""

    def __init__(
        self,
        requests: Sequence[Request],
        placement: Placement,
        profile: WorkerProfile,
        detail: Detail = "fast",
    ) -> None:
        self.placement = placement
        self._requests = requests
        self._profile = profile
        self._detail = detail
        self._guess = _index(USUAL_LOAD * _prefill_capacity(requests, placement, profile))
        self._outcomes: dict[int, Outcome] = {}
        self._given_up: dict[Slo, set[int]] = defaultdict(set)  # runs that missed an SLO

    def exceeds(self, rate: float, slo: Slo) -> bool:
        """Whether goodput is over ``rate``: one simulation, at the next rate of the grid.

        Over 0 it takes the search for goodput.
        """
        if not rate:
            return self.goodput(slo) > 0
        above = math.floor(math.log(rate, GRID) + ROUNDING) + 1
        return self._meets(max(self._guess - SLOWEST + 1, above), slo)

    def goodput(self, slo: Slo) -> float:
        """Requests a second, on the grid; 0 when even a rate 1000 times lower misses the SLO.

        Attainment falls with the rate, but for chance: one crossing is found, whichever.
        """
        low, high = self._bracket(slo)
        while high - low > 1:
            middle = (low + high) // 2
            if self._meets(middle, slo):
                low = middle
            else:
                high = middle
        return GRID**low if low > self._guess - SLOWEST else 0.0

    def outcome(self, rate: float) -> Outcome:
        """What the placement gives at a rate that ``goodput`` returned."""
        return self._outcomes[_index(rate)]

    def duration(self, rate: float) -> float:
        """Seconds from the first arrival to the last at ``rate``."""
        first, last = self._requests[0].arrival, self._requests[-1].arrival
        return (last - first) * rate_of(self._requests) / rate

    def _bracket(self, slo: Slo) -> tuple[int, int]:
        """Grid points between which the SLO begins to be missed.

        They come from what was simulated for other SLOs, or from ever wider steps.
        """
        if not self._outcomes and not self._given_up[slo]:
            self._meets(self._guess, slo)
        slowest, fastest = self._guess - SLOWEST, self._guess + FASTEST
        low = max((i for i in self._outcomes if self._meets(i, slo)), default=slowest)
        seen = (*self._outcomes, *self._given_up[slo])
        high = min((i for i in seen if i > low), default=fastest)
        step = FIRST_STEP
        while high == fastest and low + step < fastest:
            if self._meets(low + step, slo):
                low += step
            else:
                high = low + step
            step *= 2
        while low == slowest and high - step > slowest:
            if self._meets(high - step, slo):
                low = high - step
            else:
                high -= step
            step *= 2
        return low, high

    def _meets(self, index: int, slo: Slo) -> bool:
        """Whether a rate keeps the SLO. A run that can no longer is given up."""
        if index in self._given_up[slo]:
            return False
        if index not in self._outcomes:
            num_requests = len(self._requests)

            def hopeless(outcome: Outcome) -> bool:
                return num_requests - outcome.num_missed(slo) < slo.attainment * num_requests

            outcome = simulate(
                at_rate(self._requests, GRID**index),
                self.placement,
                self._profile,
                detail=self._detail,
                give_up=hopeless,
            )
            if outcome.num_requests < num_requests:
                self._given_up[slo].add(index)
                return False
            self._outcomes[index] = outcome
        return self._outcomes[index].attainment(slo) >= slo.attainment


def _index(rate: float) -> int:
    return round(math.log(rate, GRID))


def _prefill_capacity(
    requests: Sequence[Request], placement: Placement, profile: WorkerProfile
) -> float:
    """Requests a second that prefill computes at most, without a cache."""
    lengths = [request.prompt_tokens for request in requests]
    seconds = sum(profile.latency.step_seconds(n, n * n, 0, 0) for n in lengths)
    return (placement.prefill or placement.colocated) * len(lengths) / seconds
