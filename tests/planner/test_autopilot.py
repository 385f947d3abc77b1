"""The autopilot's decisions, by a scripted prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from planner.autopilot import decide, judge
from planner.autopilot_terms import Decision, Limits, Observation, Pools, Predict, State
from planner.observed import Row
from planner.outcome import Slo
from planner.workload import Request
from protocol.errors import ConfigError

LIMITS = Limits(Slo(ttft=1.0, tpot=0.1))
SCALING = replace(LIMITS, workers=(2, 6))
DUE = State(forecast_due=0.0)
LATER = State(forecast_due=1e9)  # only misses count


def rows(*, ttft: float = 0.5, count: int = 100) -> list[Row]:
    """Requests of the last minute, all alike."""
    start = LIMITS.window - LIMITS.recent
    return [Row(start + 0.5 * i, 100, 10, 0, ttft, 0.01) for i in range(count)]


def seen(pools: Pools, *, ttft: float = 0.5, wait: float = 0.0) -> Observation:
    return Observation(pools, rows(ttft=ttft), wait=wait, num_open=1)


def by_prefill(**shares: float) -> Predict:
    """Attainment by the number of prefill workers: ``p1=0.5``; 0 of any other."""

    def predict(_: Sequence[Request], pools: Pools) -> float:
        return shares.get(f"p{pools.prefill}", 0.0)

    return predict


def wanted(decision: Decision | None) -> Pools | None:
    return None if decision is None else decision.wanted


def test_a_forecast_moves_to_the_best_ratio_and_says_why() -> None:
    predict = by_prefill(p1=0.6, p2=0.7, p3=0.95)
    state, decision = decide(seen(Pools(1, 3)), DUE, 10.0, LIMITS, predict)
    assert decision is not None
    assert (decision.kind, decision.wanted, decision.predicted) == ("forecast", Pools(3, 1), 0.95)
    assert "60.0% within the SLO at 1P3D, 95.0% at 3P1D" in decision.reason
    assert state.allowed == range(3, 4)
    assert (state.changed, state.unjudged) == (10.0, (decision,))


def test_a_small_gain_changes_nothing() -> None:
    predict = by_prefill(p1=0.90, p2=0.915)
    assert decide(seen(Pools(1, 3)), DUE, 0.0, LIMITS, predict)[1] is None


def test_equal_ratios_change_nothing() -> None:
    predict = by_prefill(p1=1.0, p2=1.0, p3=1.0)
    assert decide(seen(Pools(2, 2)), DUE, 0.0, LIMITS, predict)[1] is None


def test_misses_move_one_worker_without_waiting_for_a_forecast() -> None:
    predict = by_prefill(p1=0.2, p2=0.6, p3=1.0)
    _, decision = decide(seen(Pools(1, 3), ttft=3.0), LATER, 0.0, LIMITS, predict)
    assert decision is not None
    assert (decision.kind, decision.wanted) == ("misses", Pools(2, 2))
    _, decision = decide(seen(Pools(1, 3), wait=2.0), LATER, 0.0, LIMITS, predict)
    assert wanted(decision) == Pools(2, 2), "a long queue is a miss before any request ends late"


def test_what_waits_in_the_router_is_demand_and_misses_deadlines_before_it_ends() -> None:
    """Nothing that ended was late: the requests that are held back say it all."""
    asked: list[Sequence[Request]] = []

    def predict(requests: Sequence[Request], pools: Pools) -> float:
        asked.append(requests)
        return {1: 0.2, 2: 0.6}.get(pools.prefill, 0.0)

    ended = seen(Pools(1, 3))
    queued = [Row(LIMITS.window - 30.0 + i, 700, 0, 0, None, None) for i in range(20)]
    _, decision = decide(replace(ended, queued=queued), LATER, 0.0, LIMITS, predict)
    assert decision is not None
    assert (decision.kind, decision.wanted) == ("misses", Pools(2, 2))
    [requests, *_] = asked
    assert len(requests) == len(ended.rows) + len(queued)
    assert [r.arrival for r in requests] == sorted(r.arrival for r in requests)
    assert sum(r.prompt_tokens == 700 and r.output_tokens == 10 for r in requests) == len(queued)


def test_what_has_just_come_into_the_queue_is_no_miss() -> None:
    soon = LIMITS.window - LIMITS.slo.ttft / 2
    queued = [Row(soon + 0.01 * i, 700, 0, 0, None, None) for i in range(20)]
    observed = replace(seen(Pools(1, 3)), queued=queued)
    predict = by_prefill(p1=0.2, p2=1.0)
    assert decide(observed, LATER, 0.0, LIMITS, predict)[1] is None
    late = [row._replace(arrival=row.arrival - LIMITS.slo.ttft) for row in queued]
    assert decide(replace(observed, queued=late), LATER, 0.0, LIMITS, predict)[1] is not None


def test_without_misses_nothing_happens_between_two_forecasts() -> None:
    predict = by_prefill(p1=0.2, p2=1.0)
    assert decide(seen(Pools(1, 3)), LATER, 0.0, LIMITS, predict)[1] is None


def test_a_reaction_stays_within_what_the_forecast_allows() -> None:
    predict = by_prefill(p1=0.2, p2=1.0)
    late = seen(Pools(1, 3), ttft=3.0)
    state = replace(LATER, allowed=range(1, 2))
    assert decide(late, state, 0.0, LIMITS, predict)[1] is None
    state = replace(LATER, allowed=range(1, 3))
    assert wanted(decide(late, state, 0.0, LIMITS, predict)[1]) == Pools(2, 2)


def test_after_a_change_a_cool_down_passes_first() -> None:
    predict = by_prefill(p2=0.2, p3=1.0)
    state = State(forecast_due=0.0, changed=100.0, direction=(1, 0))
    assert decide(seen(Pools(2, 2)), state, 159.0, LIMITS, predict)[1] is None
    assert wanted(decide(seen(Pools(2, 2)), state, 161.0, LIMITS, predict)[1]) == Pools(3, 1)


def test_a_change_is_not_taken_back_soon() -> None:
    predict = by_prefill(p1=1.0, p2=0.2)
    state = State(forecast_due=0.0, changed=100.0, direction=(1, 0))
    assert decide(seen(Pools(2, 2)), state, 699.0, LIMITS, predict)[1] is None
    assert wanted(decide(seen(Pools(2, 2)), state, 701.0, LIMITS, predict)[1]) == Pools(1, 3)


def test_what_may_not_be_taken_back_does_not_hold_up_new_workers() -> None:
    predict = by_prefill(p1=0.8, p2=0.2)
    state = State(forecast_due=0.0, changed=100.0, direction=(1, 0))
    _, decision = decide(seen(Pools(2, 2)), state, 161.0, SCALING, predict)
    assert decision is not None
    assert (decision.kind, decision.wanted.num_workers) == ("workers", 5)


OWN = Pools(2, 2, 0)  # decode may be given prompts


def by_prompts(**shares: float) -> Predict:
    """Attainment of 2P2D by decode's longest prompt: ``t100=0.95``; 0.5 of any other."""

    def predict(_: Sequence[Request], pools: Pools) -> float:
        return shares.get(f"t{pools.local_prefill_tokens}", 0.5) if pools.prefill == 2 else 0.5

    return predict


@pytest.mark.parametrize(("state", "ttft"), [(DUE, 0.5), (LATER, 3.0)])
def test_decode_is_given_prompts_where_no_ratio_does(state: State, ttft: float) -> None:
    observed = seen(OWN, ttft=ttft)
    _, decision = decide(observed, state, 0.0, SCALING, by_prompts(t0=0.6, t100=0.95))
    assert wanted(decision) == replace(OWN, local_prefill_tokens=100)
    assert decision is not None
    assert "95.0% at 2P2D with prompts of up to 100 tokens on decode" in decision.reason
    assert decide(observed, state, 0.0, LIMITS, by_prompts(t0=0.91, t100=1.0))[1] is None
    fixed = replace(observed, pools=Pools(2, 2))
    assert decide(fixed, state, 0.0, LIMITS, by_prompts(t100=0.95))[1] is None


def test_prompts_given_are_not_soon_taken_back() -> None:
    present = replace(OWN, local_prefill_tokens=100)
    state = State(forecast_due=0.0, changed=100.0, direction=(0, 1))
    predict = by_prompts(t0=0.95, t100=0.5)
    assert decide(seen(present), state, 699.0, LIMITS, predict)[1] is None
    assert wanted(decide(seen(present), state, 701.0, LIMITS, predict)[1]) == OWN


def test_far_from_the_slo_a_change_must_promise_more() -> None:
    for best, changes in ((0.35, False), (0.45, True)):
        predict = by_prefill(p1=0.3, p2=0.3, p3=best)
        _, decision = decide(seen(Pools(2, 2)), DUE, 0.0, LIMITS, predict)
        assert (decision is not None) == changes


def test_no_pool_is_ever_emptied() -> None:
    asked: list[Pools] = []

    def predict(_: Sequence[Request], pools: Pools) -> float:
        asked.append(pools)
        return pools.prefill / 10  # more prefill is always better

    for prefill in (1, 2, 3):
        decide(seen(Pools(prefill, 4 - prefill), ttft=3.0), DUE, 0.0, SCALING, predict)
    assert asked
    assert all(pools.prefill >= 1 <= pools.decode for pools in asked)


@pytest.mark.parametrize("pools", [Pools(0, 3), Pools(2, 0)])
def test_one_pool_alone_is_left_as_it_is(pools: Pools) -> None:
    assert decide(seen(pools), DUE, 0.0, LIMITS, by_prefill())[1] is None


def test_a_change_under_way_is_waited_for() -> None:
    busy = replace(seen(Pools(1, 3)), changing=True)
    assert decide(busy, DUE, 0.0, LIMITS, by_prefill(p2=1.0))[1] is None


def test_too_few_requests_say_nothing() -> None:
    few = Observation(Pools(1, 3), rows(count=19), num_open=1)
    state, decision = decide(few, DUE, 0.0, LIMITS, by_prefill(p2=1.0))
    assert decision is None
    assert state == DUE, "the forecast is due as soon as there is enough"


def test_no_traffic_leaves_the_fewest_workers() -> None:
    old = [row._replace(arrival=row.arrival - 300) for row in rows()]
    for nothing in (Observation(Pools(3, 3), []), Observation(Pools(3, 3), old)):
        _, decision = decide(nothing, LATER, 0.0, SCALING, by_prefill())
        assert decision is not None
        assert (decision.kind, decision.wanted) == ("idle", Pools(1, 1))
        assert decide(nothing, LATER, 0.0, LIMITS, by_prefill())[1] is None, "numbers are fixed"
    long_one = Observation(Pools(3, 3), [], num_open=1)
    assert decide(long_one, LATER, 0.0, SCALING, by_prefill())[1] is None


def test_workers_are_added_only_when_no_ratio_does() -> None:
    def predict(_: Sequence[Request], pools: Pools) -> float:
        return {Pools(3, 2): 0.95, Pools(2, 3): 0.9}.get(pools, 0.5)

    _, decision = decide(seen(Pools(2, 2)), DUE, 0.0, SCALING, predict)
    assert decision is not None
    assert (decision.kind, decision.wanted, decision.predicted) == ("workers", Pools(3, 2), 0.95)
    assert decide(seen(Pools(2, 2)), DUE, 0.0, LIMITS, predict)[1] is None
    full = replace(SCALING, workers=(2, 4))
    assert decide(seen(Pools(2, 2)), DUE, 0.0, full, predict)[1] is None


def test_a_worker_goes_when_fewer_carry_more_than_comes() -> None:
    rates = []

    def predict(requests: Sequence[Request], pools: Pools) -> float:
        rates.append(99 / (requests[-1].arrival - requests[0].arrival))
        return 1.0 if pools.decode >= 2 else 0.3

    _, decision = decide(seen(Pools(2, 2)), DUE, 0.0, SCALING, predict)
    assert wanted(decision) == Pools(1, 2)
    assert max(rates) == pytest.approx(2.0 / LIMITS.slack)


def test_a_decision_is_judged_by_the_requests_of_its_cool_down() -> None:
    decision = Decision(1000.0, "forecast", Pools(1, 3), Pools(2, 2), "", 0.9)
    state = replace(LATER, unjudged=(decision,))
    begin = 1061.0 - LIMITS.window
    ttfts = {999.0: 9.0, 1001.0: 0.5, 1030.0: 0.5, 1059.0: 9.0, 1060.5: 9.0}
    told = [Row(arrival - begin, 100, 10, 0, ttft, 0.01) for arrival, ttft in ttfts.items()]
    looked = Observation(Pools(2, 2), told)
    assert judge(looked, state, 1059.0, LIMITS) == (state, [])
    state, judged = judge(looked, state, 1061.0, LIMITS)
    assert [one.outcome for one in judged] == [pytest.approx(2 / 3)]
    assert state.unjudged == ()
    held_back = replace(looked, queued=[Row(1040.0 - begin, 100, 0, 0, None, None)])
    _, [one] = judge(held_back, replace(LATER, unjudged=(decision,)), 1061.0, LIMITS)
    assert one.outcome == pytest.approx(2 / 4), "a request that has waited too long has missed"


@pytest.mark.parametrize(
    "wrong", [{"workers": (1, 4)}, {"workers": (5, 4)}, {"cool_down": 0}, {"window": 10}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(LIMITS, **wrong)
