"""From an SLO, a workload and a number of workers to a pool ratio, or to no pools at all.

Every ratio of two pools is tried with every token budget and every length of prompts that decode
computes itself (``router.disaggregation``): ``planner.search`` says how that is quick.
Colocated workers with chunked prefill, on the same latency model and with their own best budget,
are the baseline; pools that do not clearly beat them are not worth their transfers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from planner.outcome import Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.search import Option, Search
from planner.simulator import simulate
from planner.workload import Request, at_rate, prompt_lengths

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)  # tokens of a step
USUAL_LIMITS = Placement(colocated=1)
MARGIN = 1.05  # by which pools must beat colocation, and prompts on decode none there
MAP_FACTORS = (0.5, 1.0, 2.0)  # of both deadlines
LONG_ENOUGH = 5  # a run's duration over the time of a median request


@dataclass(frozen=True, slots=True)
class MapCell:
    """Goodput of both ways, requests a second, under one SLO."""

    ttft: float
    tpot: float
    disaggregated: float
    prefill: int  # workers of its best ratio
    colocated: float

    @property
    def ratio(self) -> float | None:
        """Disaggregated over colocated; None when colocation cannot keep the SLO."""
        return self.disaggregated / self.colocated if self.colocated else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and why.

    ``ratios`` are the best pools among their neighbours, by prefill workers; ``variants`` have its
    ratio, but another token budget or other prompts on decode.
    """

    slo: Slo
    best: Option
    ratios: list[Option]
    variants: list[Option]
    colocated: Option
    slo_map: list[MapCell]
    checked: float | None  # attainment of ``best`` at its goodput, in exact detail
    notes: list[str]

    @property
    def disaggregate(self) -> bool:
        """Whether the answer is two pools."""
        return self.best.placement.colocated == 0

    def answer(self) -> str:
        """One sentence for the operator."""
        if not self.best.goodput:
            return "No placement keeps this SLO at any rate: relax it or take faster workers."
        pools = max(self.ratios, key=lambda option: option.goodput, default=None)
        rate = f"{self.best.goodput:.2f} requests/s"
        budget = f"--max-num-batched-tokens {self.best.placement.max_num_batched_tokens}"
        if self.disaggregate:
            local = self.best.placement.local_prefill_tokens
            head = f"Disaggregate: {self.best.placement.prefill} prefill and "
            head += f"{self.best.placement.decode} decode workers, {budget}"
            head += f" and --local-prefill-tokens {local}, carry {rate}"
            if not self.colocated.goodput:
                return head + "; colocated workers keep this SLO at no rate."
            gain = self.best.goodput / self.colocated.goodput
            return head + f", {gain:.2f} times what colocated workers carry."
        head = f"Do not disaggregate: {self.best.placement.colocated} colocated workers, {budget}, "
        if pools is None:
            return head + f"carry {rate}; two pools need two workers."
        share = pools.goodput / self.best.goodput
        return head + f"carry {rate}; the best pools carry {share:.2f} times that."


class Planner:
    """Finds placements of ``num_workers`` for one workload.

    Of ``limits`` count the sequences of a batch and the block size.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        profile: WorkerProfile,
        num_workers: int,
        limits: Placement = USUAL_LIMITS,
    ) -> None:
        self._requests = requests
        self._profile = profile
        self._num_workers = num_workers
        self._budgets = [replace(limits, max_num_batched_tokens=budget) for budget in BUDGETS]
        self._search = Search(requests, profile, num_workers)

    def plan(self, slo: Slo, *, with_map: bool = True) -> Plan:
        """The best placement for ``slo`` and what surrounds it."""
        colocated = self.best_colocated(slo)
        ratios: list[Option] = []
        variants: list[Option] = []
        best = colocated
        if self._num_workers > 1:
            pools = self.best_pools(slo)
            ratios = self._neighbours(pools.placement, slo)
            variants = self._variants(pools.placement, slo)
            if pools.goodput > MARGIN * colocated.goodput:
                best = pools
        return Plan(
            slo=slo,
            best=best,
            ratios=ratios,
            variants=variants,
            colocated=colocated,
            slo_map=self._map(slo, ratios) if with_map and ratios else [],
            checked=self._check(best, slo),
            notes=self._notes(best),
        )

    def best_pools(self, slo: Slo) -> Option:
        """The best without prompts on decode, or with them where that is clearly better."""
        lengths = prompt_lengths(self._requests)[1:]
        apart = [budget.with_pools(1, 1, 0) for budget in self._budgets]
        mixed = [replace(pools, local_prefill_tokens=most) for pools in apart for most in lengths]
        best = self._search.best_pools(apart, slo)
        above = MARGIN * best.goodput if best else 0.0
        found = self._search.best_pools(mixed, slo, above) or best
        return found or self.option(apart[0].with_pools(1, self._num_workers - 1), slo)

    def best_colocated(self, slo: Slo) -> Option:
        """Colocated workers with their best budget."""
        tried = [budget.with_pools(0, self._num_workers) for budget in self._budgets]
        return self._search.best(tried, slo) or self.option(tried[0], slo)

    def option(self, placement: Placement, slo: Slo) -> Option:
        """A placement's goodput and its figures there."""
        return self._search.option(placement, slo)

    def _neighbours(self, best: Placement, slo: Slo) -> list[Option]:
        """The best ratio and up to two on either side: how flat the hill is."""
        near = range(max(1, best.prefill - 2), min(self._num_workers, best.prefill + 3))
        placements = [best.with_pools(prefill, self._num_workers - prefill) for prefill in near]
        return [self.option(placement, slo) for placement in placements]

    def _variants(self, best: Placement, slo: Slo) -> list[Option]:
        """The next smaller and larger budget, and all lengths of prompts on decode."""
        at = BUDGETS.index(best.max_num_batched_tokens)
        budgets = BUDGETS[max(0, at - 1) : at + 2]
        options = [self.option(replace(best, max_num_batched_tokens=b), slo) for b in budgets]
        lengths = prompt_lengths(self._requests)
        options += [self.option(replace(best, local_prefill_tokens=n), slo) for n in lengths]
        return [option for option in options if option.placement != best]

    def _map(self, slo: Slo, ratios: list[Option]) -> list[MapCell]:
        pools = max(ratios, key=lambda option: option.goodput).placement
        cells = []
        for ttft in (slo.ttft * factor for factor in MAP_FACTORS):
            for tpot in (slo.tpot * factor for factor in MAP_FACTORS):
                asked = replace(slo, ttft=ttft, tpot=tpot)
                colocated = self.best_colocated(asked).goodput
                best = self._search.best_pools([pools], asked)
                found = (best.goodput, best.placement.prefill) if best else (0.0, pools.prefill)
                cells.append(MapCell(ttft, tpot, *found, colocated))
        return cells

    def _check(self, best: Option, slo: Slo) -> float | None:
        if not best.goodput:
            return None
        requests = at_rate(self._requests, best.goodput)
        outcome = simulate(requests, best.placement, self._profile, detail="exact")
        return outcome.attainment(slo)

    def _notes(self, best: Option) -> list[str]:
        if not best.goodput:
            return []
        duration = self._search.candidate(best.placement).duration(best.goodput)
        outputs = median(request.output_tokens for request in self._requests)
        needed = LONG_ENOUGH * (best.figures["ttft_p50"] + outputs * best.figures["tpot_p50"])
        if duration >= needed:
            return []
        count = len(self._requests)
        return [
            f"{count} requests last {duration:.1f} s at this rate, too short for queues and "
            f"batches to settle: use {round(count * needed / duration, -2):.0f} or more"
        ]
