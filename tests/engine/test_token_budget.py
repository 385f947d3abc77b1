"""How a step's tokens are shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.token_budget import prompt_budget, shares


def test_those_that_generate_come_first_and_leave_half() -> None:
    assert [prompt_budget(8, n) for n in (0, 3, 4, 5, 99)] == [8, 5, 4, 4, 4]
    assert [prompt_budget(n, 99) for n in (1, 2, 7)] == [1, 1, 4]


def test_short_prompts_pass_a_long_one_that_keeps_half() -> None:
    assert shares([100], 8) == [8]
    assert shares([100, 2], 8) == [6, 2]
    assert shares([100, 50, 3], 8) == [4, 1, 3]
    assert shares([2, 50, 3], 8) == [2, 3, 3]
    assert shares([], 8) == []


@given(remaining=st.lists(st.integers(1, 50), min_size=1), budget=st.integers(1, 60))
def test_no_token_is_wasted_or_given_twice(remaining: list[int], budget: int) -> None:
    given = shares(remaining, budget)
    assert sum(given) == min(budget, sum(remaining))
    assert all(0 <= share <= left for share, left in zip(given, remaining, strict=True))
    assert given[0] > 0
