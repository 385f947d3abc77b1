"""What a running router observed, and what other pools are predicted to make of it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from planner.fit import observed_profile
from planner.observed import Row, outcome_of, placement_of, repeated, requests_of
from planner.outcome import Slo
from planner.placement import Placement
from planner.simulator import simulate
from planner.what_if import Answer, answer, capacity, fits
from planner.workload import Request, at_rate, rate_of
from protocol.errors import ConfigError
from tests.planner.observations import rows, workers
from tests.planner.profiles import profile

FAST = profile(fixed=2e-3, per_token=1e-4, decode=(5e-3, 1e-7, 1e-5))
SLO = Slo(0.2, 0.02)


def ask(pools: tuple[int, int], rate_factor: float = 1.0, now: tuple[int, int] = (2, 2)) -> Answer:
    return answer(
        rows(),
        workers(FAST, *now),
        FAST,
        pools=pools,
        rate_factor=rate_factor,
        slo=SLO,
        seconds=0.2,
    )


def test_the_present_pools_at_the_present_rate_are_the_present() -> None:
    found = ask((2, 2))
    assert found.present_pools == (2, 2)
    assert found.rate == found.measured_rate == pytest.approx(5, rel=0.2)
    assert found.asked == found.present
    assert found.measured.ttft == dict.fromkeys(("p50", "p90", "p99"), pytest.approx(0.1))
    assert found.measured.attainment == 1.0
    assert not found.fits  # 0.1 s were measured, 22 ms are predicted
    assert all(point.asked == point.present for point in found.curve)


def test_more_prefill_workers_give_earlier_first_tokens_and_slower_ones_after() -> None:
    few, many = ask((1, 3), 8), ask((3, 1), 8)
    for percent in ("p50", "p90", "p99"):
        assert many.asked.ttft[percent] < few.asked.ttft[percent]
        assert many.asked.tpot[percent] > few.asked.tpot[percent]


def test_the_curve_rises_and_ends_below_its_capacity() -> None:
    found = ask((1, 3))
    rates = [point.rate for point in found.curve]
    assert rates == sorted(rates)
    assert rates[-1] > found.capacity
    assert found.curve[0].asked > 0.9 * rates[0]
    assert all(point.asked <= min(point.rate, found.capacity) for point in found.curve)


def test_table_and_curve_tell_the_same_up_to_capacity() -> None:
    found = ask((1, 3), 6)
    below = [point for point in found.curve if point.rate <= found.capacity]
    beyond = [point for point in found.curve if point.rate > found.capacity]
    assert len(below) > 2
    assert not found.asked.beyond_capacity
    rates, goodputs = zip(*((point.rate, point.asked) for point in below), strict=True)
    assert found.asked.goodput == pytest.approx(np.interp(found.rate, rates, goodputs), rel=0.05)
    assert beyond
    assert [point.asked for point in beyond] == [0.0] * len(beyond)


def test_beyond_capacity_nobody_keeps_a_ttft_and_the_answer_says_so() -> None:
    found = ask((1, 3), 100)
    assert found.rate > found.capacity
    assert found.asked.beyond_capacity
    assert not found.present.beyond_capacity
    assert found.asked.ttft == dict.fromkeys(("p50", "p90", "p99"))
    assert found.asked.tpot["p50"] is not None
    assert (found.asked.attainment, found.asked.goodput, found.margin) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("pools", [Placement(prefill=1, decode=1), Placement(colocated=1)])
def test_the_number_of_requests_hardly_matters_at_a_stable_load(pools: Placement) -> None:
    requests = requests_of(rows(4000))
    rate = 0.5 * capacity(requests, pools, FAST)
    shares = [
        simulate(at_rate(requests[:num], rate), pools, FAST).attainment(SLO)
        for num in (200, 500, 4000)
    ]
    assert max(shares) - min(shares) < 0.05


def test_no_prefill_workers_are_colocated_ones() -> None:
    assert ask((0, 4)).asked.attainment == 1.0
    assert ask((2, 2), now=(0, 4)).present_pools == (0, 4)


def test_a_model_fits_that_predicts_what_was_measured() -> None:
    requests = requests_of(rows())
    outcome = simulate(requests, Placement(prefill=1, decode=1), FAST)
    assert fits(outcome, outcome)
    slow = simulate(requests, Placement(prefill=1, decode=1), profile(decode=(10e-3, 0, 0)))
    assert not fits(outcome, slow)
    assert not fits(slow, outcome)


def test_a_single_chance_is_told() -> None:
    found = ask((2, 2))
    assert 0 < found.margin < 0.01  # all of 500 kept the deadlines: it could be 99 %


@pytest.mark.parametrize("num", [5, 19])
def test_few_requests_predict_nothing(num: int) -> None:
    with pytest.raises(ConfigError, match=f"only {num} requests were served.*20 are needed"):
        requests_of(rows(num))


def test_what_failed_came_all_the_same() -> None:
    refused = Row(1000.0, 70, 0, 0, None, None)
    observed = [*rows(30, output=40), refused]
    assert requests_of(observed)[-1] == Request(1000.0, 70, 40)
    assert outcome_of(observed).attainment(SLO) == 30 / 31


def test_requests_are_repeated_at_their_own_rate() -> None:
    requests = requests_of(rows(30))
    more = repeated(requests, 90)
    assert len(more) == 90
    assert rate_of(more) == pytest.approx(rate_of(requests), rel=1e-6)
    assert [r.prompt_tokens for r in more[30:60]] == [r.prompt_tokens for r in requests]
    assert repeated(requests, 10) == requests[-10:]


def test_the_placement_is_of_those_that_serve() -> None:
    present = workers(FAST, 2, 3)
    present[0]["state"] = "draining"
    assert placement_of(present, 200.0) == Placement(
        prefill=1, decode=3, max_num_batched_tokens=512, max_num_seqs=64, block_size=16
    )
    assert placement_of(present, 4000.0).block_size == 64
    with pytest.raises(ConfigError, match="no decode worker serves"):
        placement_of(workers(FAST, 2, 0), 200.0)


@pytest.mark.parametrize("pools", [Placement(prefill=1, decode=1), Placement(colocated=1)])
def test_nobody_computes_more_than_capacity(pools: Placement) -> None:
    requests = requests_of(rows(400, rate=1e4))  # all at once
    outcome = simulate(requests, pools, FAST)
    ends = outcome.ttft + 49 * outcome.tpot
    most = capacity(requests, pools, FAST)
    assert 0.9 * most <= len(requests) / max(ends) <= 1.05 * most


def test_cached_tokens_are_not_computed_again() -> None:
    whole = [Request(float(i), 320, 2) for i in range(20)]
    cached = [Request(float(i), 320, 2, cached_tokens=256) for i in range(20)]
    pools = Placement(prefill=1, decode=1, block_size=16)
    outcome = simulate(cached, pools, FAST)
    assert outcome.cached_tokens == 20 * 256
    assert outcome.ttft == pytest.approx(2e-3 + 64e-4)
    assert simulate(whole, pools, FAST).ttft == pytest.approx(2e-3 + 320e-4)


def test_an_answer_is_soon_there() -> None:
    begun = time.process_time()
    answer(
        rows(1000, prompt=4000, output=300),
        workers(FAST, 4, 4),
        FAST,
        pools=(5, 3),
        rate_factor=1.0,
        slo=SLO,
        seconds=0.5,
    )
    assert time.process_time() - begun < 10  # 0.7 s where nothing else runs


def test_the_workers_own_steps_give_the_model() -> None:
    found = observed_profile(workers(FAST, 1, 1)).latency
    for work in ((300, 300**2, 0, 0), (0, 0, 4, 2000)):
        assert found.step_seconds(*work) == pytest.approx(
            FAST.latency.step_seconds(*work), rel=0.05
        )
