"""What the autopilot never does, whatever it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.autopilot import CALM, decide
from planner.autopilot_terms import Decision, Limits, Observation, Pools, Predict, State
from planner.observed import Row
from planner.outcome import Slo
from planner.workload import Request

LIMITS = Limits(Slo(ttft=1.0, tpot=0.1))
LOOK = 5.0  # seconds
TEN_MINUTES = 600.0

shares = st.floats(0, 1)
pools = st.builds(Pools, st.integers(1, 6), st.integers(1, 6), st.none() | st.integers(0, 500))
looks = st.lists(st.booleans(), min_size=1, max_size=20)  # whether requests are late, look by look


def rows(late: bool) -> list[Row]:
    """Two minutes of requests, all alike."""
    start = LIMITS.window - 120
    return [Row(start + 0.5 * i, 100, 10, 0, 9.0 if late else 0.1, 0.01) for i in range(240)]


def drive(
    present: Pools,
    seconds: float,
    limits: Limits,
    predict: Predict,
    told: Callable[[float], Observation],
) -> list[Decision]:
    """Looks every five seconds at pools that become what was decided."""
    state, decisions, now = State.at_start(0.0, limits), list[Decision](), 0.0
    while now < seconds:
        seen = replace(told(now), pools=present)
        state, decision = decide(seen, state, now, limits, predict)
        if decision is not None:
            decisions.append(decision)
            present = decision.wanted
        now += LOOK
    return decisions


def under_way(late: Sequence[bool]) -> Callable[[float], Observation]:
    return lambda now: Observation(Pools(1, 1), rows(late[int(now / LOOK) % len(late)]), num_open=1)


@settings(max_examples=50, deadline=None)
@given(
    present=st.builds(Pools, st.integers(1, 3), st.integers(1, 2)),
    table=st.lists(shares, min_size=4, max_size=4),
    late=looks,
)
def test_constant_load_is_no_reason_for_two_changes(
    present: Pools, table: list[float], late: list[bool]
) -> None:
    decisions = drive(
        present, TEN_MINUTES, LIMITS, lambda _, pools: table[pools.prefill - 1], under_way(late)
    )
    assert len(decisions) <= 1


@settings(max_examples=50, deadline=None)
@given(
    present=pools,
    bounds=st.none() | st.tuples(st.integers(2, 5), st.integers(5, 14)),
    late=looks,
    seed=st.integers(0, 1000),
)
def test_whatever_is_predicted(
    present: Pools, bounds: tuple[int, int] | None, late: list[bool], seed: int
) -> None:
    """No pool is emptied, changes keep their distance, none is soon taken back."""
    random, limits = Random(seed), replace(LIMITS, workers=bounds)

    def predict(_: Sequence[Request], pools: Pools) -> float:
        assert min(pools.prefill, pools.decode) >= 1
        return random.random()

    decisions = drive(present, 1800.0, limits, predict, under_way(late))
    for one in decisions:
        assert min(one.wanted.prefill, one.wanted.decode) >= 1
        if bounds is None:
            assert one.wanted.num_workers == present.num_workers
        elif one.kind == "workers":
            assert abs(one.wanted.num_workers - one.present.num_workers) == 1
            grown = one.wanted.num_workers > one.present.num_workers
            assert one.wanted.num_workers <= bounds[1] if grown else True
            assert one.wanted.num_workers >= bounds[0] or grown
        if present.local_prefill_tokens is None:
            assert one.wanted.local_prefill_tokens is None
    for index, one in enumerate(decisions):
        for later in decisions[index + 1 :]:
            assert later.at - one.at >= limits.cool_down
            soon = later.at - one.at < CALM * limits.cool_down
            if soon and _roles_only(one) and _roles_only(later):
                assert _step(one) * _step(later) >= 0


def _roles_only(one: Decision) -> bool:
    return one.kind in ("forecast", "misses")


def _step(one: Decision) -> int:
    return one.wanted.prefill - one.present.prefill


@settings(max_examples=50, deadline=None)
@given(present=pools, fewest=st.integers(2, 6), quiet=st.floats(0, 500))
def test_no_traffic_leaves_the_fewest_within_a_cool_down(
    present: Pools, fewest: int, quiet: float
) -> None:
    """The last request came ``quiet`` seconds after the first look."""
    limits = replace(LIMITS, workers=(fewest, 12))

    def told(now: float) -> Observation:
        begin = now - limits.window
        told = [Row(0.25 * i - begin, 100, 10, 0, 0.1, 0.01) for i in range(int(4 * quiet))]
        kept = [row for row in told if 0 <= row.arrival <= limits.window]
        return Observation(present, kept, num_open=int(now < quiet))

    decisions = drive(present, quiet + 600, limits, lambda *_: 0.95, told)
    idle = [one for one in decisions if one.kind == "idle"]
    left = decisions[-1].wanted if decisions else present
    assert left.num_workers <= fewest
    assert len(idle) <= 1
    if idle:
        assert idle[0].at <= quiet + 2 * limits.cool_down + LOOK, "its own cool-down may come first"


@pytest.mark.parametrize("present", [Pools(1, 1), Pools(2, 1)])
def test_nothing_ever_came(present: Pools) -> None:
    limits = replace(LIMITS, workers=(2, 4))
    decisions = drive(present, 600.0, limits, lambda *_: 0.0, lambda _: Observation(present, []))
    assert [one.wanted for one in decisions] == ([Pools(1, 1)] if present != Pools(1, 1) else [])
