"""How a prefill worker's speed is measured."""

from __future__ import annotations

import pytest

from prefill.rate import PrefillRate


def test_the_rate_is_that_of_the_time_spent_computing() -> None:
    rate = PrefillRate()
    assert rate.tokens_per_second == 0.0
    rate.step(500, 0.5)
    assert rate.tokens_per_second == pytest.approx(1000)
    rate.step(1, 0.001)  # a small step is slow, but hardly counts
    assert rate.tokens_per_second == pytest.approx(1000, rel=0.01)


def test_the_past_is_forgotten() -> None:
    rate = PrefillRate()
    rate.step(500, 0.5)
    for _ in range(100):
        rate.step(500, 0.1)
    assert rate.tokens_per_second == pytest.approx(5000, rel=0.01)
