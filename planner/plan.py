"""From an SLO, a workload and a number of workers to a pool ratio, or to no pools at all.

The ratio is found by climbing: goodput has one hill over it (too few prefill workers queue
prompts, too few decode workers fill batches). Then every token budget is tried at that ratio, and
then how long prompts may be that decode computes itself (``router.disaggregation``).
Colocated workers with chunked prefill, on the same latency model and with their own best budget,
are the baseline; pools that do not clearly beat them are not worth their transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from planner.goodput import Candidate
from planner.outcome import Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import simulate
from planner.workload import Request, at_rate, prompt_lengths
from protocol.errors import ConfigError

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)  # tokens of a step
FIRST_BUDGET = 2048
USUAL_LIMITS = Placement(colocated=1)
MARGIN = 1.05  # by which pools must beat colocation, and prompts on decode none there
MAP_FACTORS = (0.5, 1.0, 2.0)  # of both deadlines
LONG_ENOUGH = 5  # a run's duration over the time of a median request


@dataclass(frozen=True, slots=True)
class Option:
    """A placement, the highest rate (requests a second) at which it keeps the SLO, and how."""

    placement: Placement
    goodput: float
    figures: dict[str, float]  # seconds by name, at that rate; empty when it keeps it at none


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
        if num_workers < 1:
            raise ConfigError("a plan needs at least one worker")
        self._requests = requests
        self._profile = profile
        self._num_workers = num_workers
        self._limits = limits
        self._candidates: dict[Placement, Candidate] = {}

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
        """The better of two searches: from pools that part all work, and from mixed ones."""
        apart = self._best_from(0, slo)
        mixed = self._best_from(max(prompt_lengths(self._requests)), slo)
        return mixed if mixed.goodput > MARGIN * apart.goodput else apart

    def _best_from(self, local: int, slo: Slo) -> Option:
        """The best ratio with prompts of so many tokens on decode, budget and prompts at it.

        Where other prompts on decode are better, their best ratio.
        """
        first = replace(self._limits, max_num_batched_tokens=FIRST_BUDGET)
        prefill = self._num_workers // 2
        half = first.with_pools(prefill, self._num_workers - prefill, local)
        found = self._best_budget(self._climb_ratio(half, slo), slo)
        other = max(self._with_prompts(found.placement, slo), key=lambda other: other.goodput)
        if other.goodput > MARGIN * found.goodput:
            found = self.option(self._climb_ratio(other.placement, slo), slo)
        return found

    def best_colocated(self, slo: Slo) -> Option:
        """Colocated workers with their best budget."""
        return self._best_budget(self._limits.with_pools(0, self._num_workers), slo)

    def option(self, placement: Placement, slo: Slo) -> Option:
        """A placement's goodput and its figures there."""
        candidate = self._candidate(placement)
        goodput = candidate.goodput(slo)
        return Option(placement, goodput, candidate.outcome(goodput).figures() if goodput else {})

    def _candidate(self, placement: Placement) -> Candidate:
        if placement not in self._candidates:
            self._candidates[placement] = Candidate(self._requests, placement, self._profile)
        return self._candidates[placement]

    def _goodput(self, placement: Placement, slo: Slo) -> float:
        return self._candidate(placement).goodput(slo)

    def _climb_ratio(self, start: Placement, slo: Slo) -> Placement:
        def ratio(prefill: int) -> Placement:
            return start.with_pools(prefill, self._num_workers - prefill)

        over = range(1, self._num_workers)
        return ratio(climb(lambda prefill: self._goodput(ratio(prefill), slo), over, start.prefill))

    def _best_budget(self, placement: Placement, slo: Slo) -> Option:
        """All of them are tried: goodput has more than one hill over the budget."""
        tried = [replace(placement, max_num_batched_tokens=budget) for budget in BUDGETS]
        return self.option(max(tried, key=lambda other: self._goodput(other, slo)), slo)

    def _with_prompts(self, placement: Placement, slo: Slo) -> list[Option]:
        """A ratio with every length of prompts on decode."""
        lengths = prompt_lengths(self._requests)
        tried = [replace(placement, local_prefill_tokens=tokens) for tokens in lengths]
        return [self.option(other, slo) for other in tried]

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
        options += self._with_prompts(best, slo)
        return [option for option in options if option.placement != best]

    def _map(self, slo: Slo, ratios: list[Option]) -> list[MapCell]:
        start = max(ratios, key=lambda option: option.goodput).placement
        cells = []
        for ttft in (slo.ttft * factor for factor in MAP_FACTORS):
            for tpot in (slo.tpot * factor for factor in MAP_FACTORS):
                asked = replace(slo, ttft=ttft, tpot=tpot)
                pools = self._climb_ratio(start, asked)
                colocated = self.best_colocated(asked).goodput
                goodput = self._goodput(pools, asked)
                cells.append(MapCell(ttft, tpot, goodput, pools.prefill, colocated))
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
        duration = self._candidate(best.placement).duration(best.goodput)
        outputs = median(request.output_tokens for request in self._requests)
        needed = LONG_ENOUGH * (best.figures["ttft_p50"] + outputs * best.figures["tpot_p50"])
        if duration >= needed:
            return []
        count = len(self._requests)
        return [
            f"{count} requests last {duration:.1f} s at this rate, too short for queues and "
            f"batches to settle: use {round(count * needed / duration, -2):.0f} or more"
        ]


def climb(score: Callable[[int], float], over: range, start: int) -> int:
    """The top of the hill around ``start``: wide steps first, then single ones.

    At most 2·log2 of the range in wide steps; equal scores end the climb.
    """
    scores: dict[int, float] = {}

    def scored(index: int) -> float:
        if index not in scores:
            scores[index] = score(index)
        return scores[index]

    best, step = min(max(start, over.start), over.stop - 1), max(1, len(over) // 8)
    while step:
        near = [index for index in (best - step, best + step) if index in over]
        higher = max(near, key=scored, default=best)
        if scored(higher) > scored(best):
            best = higher
        else:
            step //= 2
    return best
