"""The best of many placements, without finding the goodput of each.

Placements race: one simulation, at the next rate above the best goodput so far, drops each that
does not beat it, and ends as soon as too many requests have missed. Only a new best one's goodput
is searched for. As far as attainment falls with the rate, the winner is an exhaustive sweep's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.goodput import Candidate
from planner.outcome import Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.workload import Request
from protocol.errors import ConfigError

MAX_RATIOS = 8  # of the first round


@dataclass(frozen=True, slots=True)
class Option:
    """A placement, the highest rate (requests a second) at which it keeps the SLO, and how."""

    placement: Placement
    goodput: float
    figures: dict[str, float]  # seconds by name, at that rate; empty when it keeps it at none


class Search:
    """Compares placements of ``num_workers`` under one workload; remembers what it simulated."""

    def __init__(
        self, requests: Sequence[Request], profile: WorkerProfile, num_workers: int
    ) -> None:
        if num_workers < 1:
            raise ConfigError("a plan needs at least one worker")
        self.num_workers = num_workers
        self._requests = requests
        self._profile = profile
        self._candidates: dict[Placement, Candidate] = {}

    def candidate(self, placement: Placement) -> Candidate:
        """A placement under the workload."""
        if placement not in self._candidates:
            self._candidates[placement] = Candidate(self._requests, placement, self._profile)
        return self._candidates[placement]

    def option(self, placement: Placement, slo: Slo) -> Option:
        """A placement's goodput and its figures there."""
        candidate = self.candidate(placement)
        goodput = candidate.goodput(slo)
        return Option(placement, goodput, candidate.outcome(goodput).figures() if goodput else {})

    def best(self, placements: Iterable[Placement], slo: Slo, above: float = 0.0) -> Option | None:
        """The highest goodput, the first of equals; None when none is over ``above``."""
        best = None
        for placement in placements:
            if self.candidate(placement).exceeds(above, slo):
                best = self.option(placement, slo)
                above = best.goodput
        return best

    def best_pools(
        self, variants: Sequence[Placement], slo: Slo, above: float = 0.0
    ) -> Option | None:
        """The best of all ratios of some pools; None when none is over ``above``.

        All ratios of few workers, of many at first every n-th and then nearer and nearer to the
        best: the first round sees every hill, the others climb the highest.
        """
        step = -(-(self.num_workers - 1) // MAX_RATIOS)
        best = self._best_ratio(range(1, self.num_workers, step), variants, slo, above)
        while best is not None and step > 1:
            step = -(-step // 2)
            at = best.placement.prefill
            near = [at + away for away in (-step, step) if 0 < at + away < self.num_workers]
            best = self._best_ratio(near, variants, slo, best.goodput) or best
        return best

    def _best_ratio(
        self, ratios: Iterable[int], variants: Sequence[Placement], slo: Slo, above: float
    ) -> Option | None:
        every = (
            variant.with_pools(prefill, self.num_workers - prefill)
            for variant in variants
            for prefill in ratios
        )
        return self.best(every, slo, above)
