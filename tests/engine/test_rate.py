"""How a worker's speed is measured."""

from __future__ import annotations

import pytest

from engine.rate import Rate


def test_the_rate_is_that_of_the_time_spent_computing() -> None:
    rate = Rate()
    assert rate.per_second == 0.0
    rate.add(500, 0.5)
    assert rate.per_second == pytest.approx(1000)
    rate.add(1, 0.001)  # a small step is slow, but hardly counts
    assert rate.per_second == pytest.approx(1000, rel=0.01)


def test_the_past_is_forgotten() -> None:
    rate = Rate()
    rate.add(500, 0.5)
    for _ in range(100):
        rate.add(500, 0.1)
    assert rate.per_second == pytest.approx(5000, rel=0.01)
