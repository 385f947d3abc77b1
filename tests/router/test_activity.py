"""The activity window: percentiles, goodput, and what is present, past and gone."""

from __future__ import annotations

import pytest

from router.activity import NUM_SLOTS, SLOT, Activity, Histogram, Objective, percentiles

GOAL = Objective(time_to_first_token=1.0, time_per_output_token=0.1)


def test_percentiles_are_within_one_percent() -> None:
    histogram, other = Histogram(), Histogram()
    for i in range(1, 1001):
        (histogram if i % 2 else other).add(i / 1000)
    found = percentiles([histogram, other])
    assert found == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99}, rel=0.011)
    assert percentiles([Histogram()]) is None
    histogram = Histogram()
    histogram.add(0.0)
    assert percentiles([histogram]) == pytest.approx(
        {"p50": 1e-6, "p90": 1e-6, "p99": 1e-6}, rel=0.1
    )


def test_goodput_counts_what_is_within_both_objectives() -> None:
    activity = Activity(0.0)
    for ttft, tpot in ((0.5, 0.05), (2.0, 0.05), (0.5, 0.2), (0.5, None)):
        activity.arrived(10.0)
        activity.first_token(ttft, 7, 10.0)
        activity.tokens(3, None, 10.0)
        activity.served(ttft, tpot, 10.0)
    activity.failed(10.0)
    window = activity.present(GOAL, 20.0)
    assert window["seconds"] == 20.0
    assert window["goodput"]["requests_per_second"] == 0.1
    assert window["goodput"]["attainment"] == 0.4
    assert window["rates"] == {
        "requests": 0.2, "failed": 0.05, "prompt_tokens": 1.4, "output_tokens": 0.6,
    }  # fmt: skip


def test_what_is_older_than_a_minute_is_not_present_and_older_than_ten_is_gone() -> None:
    activity = Activity(0.0)
    activity.tokens(5, 0.01, 1.0)
    assert activity.present(GOAL, 30.0)["inter_token_latency"] is not None
    assert activity.present(GOAL, 90.0)["inter_token_latency"] is None
    history = activity.history(GOAL, 0, 90.0)
    assert [point["slot"] for point in history] == list(range(1, 18))
    everything = activity.history(GOAL, -1, 90.0)
    assert everything[0]["output_tokens"] == 1.0
    assert [point["slot"] for point in activity.history(GOAL, 15, 90.0)] == [16, 17]
    assert activity.history(GOAL, 17, 90.0) == []
    assert activity.history(GOAL, 18, 90.0) == everything
    later = NUM_SLOTS * SLOT + 90.0
    assert len(activity.history(GOAL, 0, later)) == NUM_SLOTS - 1
    assert all(point["output_tokens"] == 0 for point in activity.history(GOAL, 0, later))
