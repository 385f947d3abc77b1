"""The race of placements, over goodput that is known beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import search
from planner.outcome import Outcome, Slo
from planner.placement import Placement
from planner.profile import PUBLISHED
from planner.search import MAX_RATIOS, Search
from planner.workload import Request

SLO = Slo(1.0, 0.1)
NUM_WORKERS = 40


class Known:
    """A candidate with one hill over the ratio, its top at ``top``; counts who is looked at."""

    top = 1
    seen: list[int]

    def __init__(self, _: object, placement: Placement, __: object) -> None:
        self.seen.append(placement.prefill)
        self._goodput = max(0.0, 100.0 - abs(placement.prefill - self.top))
        self._goodput += placement.max_num_batched_tokens / 1e6

    def exceeds(self, rate: float, _: Slo) -> bool:
        return self._goodput > rate

    def goodput(self, _: Slo) -> float:
        return self._goodput

    def outcome(self, _: float) -> Outcome:
        return Outcome()


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Search:
    monkeypatch.setattr(search, "Candidate", Known)
    Known.seen = []
    requests = [Request(0.0, 1, 1), Request(1.0, 1, 1)]
    return Search(requests, PUBLISHED["h200-llama-3.1-8b"], NUM_WORKERS)


VARIANTS = [Placement(prefill=1, decode=1, max_num_batched_tokens=b) for b in (512, 4096, 1024)]


@pytest.mark.parametrize("top", range(1, NUM_WORKERS))
def test_every_top_is_found_without_looking_at_every_ratio(top: int, raced: Search) -> None:
    Known.top = top
    best = raced.best_pools(VARIANTS, SLO)
    assert best is not None
    expected = replace(VARIANTS[1], prefill=top, decode=NUM_WORKERS - top)
    assert best.placement == expected
    assert len(set(Known.seen)) <= 2 * MAX_RATIOS


def test_nothing_is_better_than_the_best(raced: Search) -> None:
    Known.top = 7
    best = raced.best_pools(VARIANTS, SLO)
    assert best is not None
    assert raced.best_pools(VARIANTS, SLO, above=best.goodput) is None


def test_of_equals_the_first_is_taken(raced: Search) -> None:
    Known.top = 7
    twins = [Placement(prefill=p, decode=NUM_WORKERS - p) for p in (8, 6)]
    best = raced.best(twins, SLO)
    assert best is not None
    assert best.placement == twins[0]
