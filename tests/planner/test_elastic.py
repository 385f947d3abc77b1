"""The autopilot over simulated workers that change their roles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.autopilot import predictor
from planner.autopilot_terms import Limits, Pools
from planner.elastic import ElasticRoute
from planner.outcome import Outcome, Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import simulate
from planner.workload import Lengths, Request, generate
from tests.planner.profiles import profile

pytestmark = pytest.mark.slow

WORKER = profile(fixed=2e-3, per_token=1e-4, decode=(10e-3, 0.0, 1e-3))
SLO = Slo(ttft=0.5, tpot=0.03)
SLOW = profile(fixed=2e-3, per_token=1e-3, decode=(10e-3, 0.0, 1e-3))  # few requests are a load
LATER = Slo(ttft=5.0, tpot=0.3)
LONG_PROMPTS = Lengths(1000, 0.5), Lengths(5, 0.5)  # 0.1 s of prefill each
LONG_ANSWERS = Lengths(20, 0.5), Lengths(100, 0.5)


def requests(lengths: tuple[Lengths, Lengths], rate: float, seconds: float) -> list[Request]:
    prompt, output = lengths
    return list(generate(rate=rate, count=int(rate * seconds), prompt=prompt, output=output))


def static(workload: list[Request], pools: Pools, worker: WorkerProfile = WORKER) -> Outcome:
    return simulate(workload, Placement(prefill=pools.prefill, decode=pools.decode), worker)


def piloted(
    workload: list[Request], pools: Pools, slo: Slo = SLO, worker: WorkerProfile = WORKER
) -> tuple[Outcome, ElasticRoute]:
    placement = Placement(prefill=pools.prefill, decode=pools.decode)
    limits, predict = Limits(slo), predictor(worker, placement, slo)
    route = ElasticRoute(placement, worker, limits, predict)
    outcome = simulate(workload, placement, worker, route=lambda *_: route, elastic=True)
    return outcome, route


def test_without_a_reason_to_change_it_is_the_static_system() -> None:
    workload = requests(LONG_PROMPTS, 2, 60)
    outcome, route = piloted(workload, Pools(2, 2))
    assert route.decisions == []
    assert outcome.figures() == static(workload, Pools(2, 2)).figures()


def test_a_wrong_ratio_is_corrected_and_every_request_served() -> None:
    workload = requests(LONG_PROMPTS, 14, 240)
    outcome, route = piloted(workload, Pools(1, 3))
    assert len(outcome.ttft) == len(workload)
    assert route.decisions[-1].wanted.prefill > 1
    assert outcome.attainment(SLO) > static(workload, Pools(1, 3)).attainment(SLO) + 0.3
    outcomes = [one.outcome for one in route.judged]
    assert outcomes
    assert all(share is not None and 0 <= share <= 1 for share in outcomes)


@pytest.mark.parametrize("rate", [5, 12, 22])
def test_constant_load_is_no_reason_for_two_changes(rate: float) -> None:
    workload = requests(LONG_PROMPTS, rate, 600)
    _, route = piloted(workload, Pools(3, 1))
    assert len(route.decisions) <= 1


def test_when_the_mix_shifts_it_beats_every_static_ratio() -> None:
    first = requests(LONG_PROMPTS, 22, 240)
    then = requests(LONG_ANSWERS, 14, 360)
    workload = first + [replace(r, arrival=r.arrival + 240) for r in then]
    outcome, route = piloted(workload, Pools(3, 1))
    best = max(static(workload, Pools(p, 4 - p)).attainment(SLO) for p in (1, 2, 3))
    assert outcome.attainment(SLO) > best
    assert 1 <= len(route.decisions) <= 3


def test_beyond_all_capacity_good_pools_are_left_as_they_are() -> None:
    workload = requests(LONG_PROMPTS, 4.5, 150)
    outcome, _ = piloted(workload, Pools(3, 1), LATER, SLOW)
    best = static(workload, Pools(3, 1), SLOW)
    assert outcome.attainment(LATER) >= best.attainment(LATER)


def test_bursts_that_no_ratio_carries_are_shared_with_decode() -> None:
    bursts = [requests(LONG_PROMPTS, 0.8, 60), requests(LONG_PROMPTS, 3.4, 60)] * 2
    shifted = [
        replace(request, arrival=request.arrival + 60 * turn)
        for turn, burst in enumerate(bursts)
        for request in burst
    ]
    workload = sorted(shifted, key=lambda request: request.arrival)
    outcome, route = piloted(workload, Pools(3, 1), LATER, SLOW)
    ratios = [static(workload, Pools(p, 4 - p), SLOW) for p in (1, 2, 3)]
    assert outcome.attainment(LATER) > max(ratio.attainment(LATER) for ratio in ratios)
    assert route.decisions[-1].wanted.local_prefill_tokens
