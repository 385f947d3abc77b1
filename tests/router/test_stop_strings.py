"""Stop strings end the text at the same place however it is cut, and are never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings

letters = st.text("abc", max_size=24)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def expected(text: str, stops: list[str], *, include: bool) -> tuple[str, bool]:
    """Letter by letter: the first end of any stop string, the longest that ends there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


@given(text=letters, stops=stop_lists, cuts=st.sets(st.integers(0, 24)), include=st.booleans())
def test_any_cut_gives_the_same_text(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    search = StopStrings(stops, include=include)
    shown, fed = "", ""
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        fed += text[start:end]
        shown += search.feed(text[start:end])
        whole, matched = expected(fed, stops, include=include)
        assert search.matched == matched
        assert whole.startswith(shown)
        if not matched:  # nothing is held back longer than it has to be
            held = fed[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops)
    shown += search.flush()
    assert (shown, search.matched) == expected(text, stops, include=include)


@pytest.mark.parametrize("cut", range(9))
def test_across_a_cut(cut: int) -> None:
    search = StopStrings(["\nUser:"])
    text = "Hi\nUser: x"
    assert search.feed(text[:cut]) + search.feed(text[cut:]) + search.flush() == "Hi"
    assert search.matched


def test_the_first_to_end_counts_and_of_those_the_longest() -> None:
    assert StopStrings(["abcd", "c", "bc"]).feed("xabcd") == "xa"
    assert StopStrings(["abcd", "c", "bc"], include=True).feed("xabcd") == "xabc"


def test_nothing_comes_after_a_match() -> None:
    search = StopStrings(["b"])
    assert search.feed("ab") == "a"
    assert search.feed("cd") == search.flush() == ""


def test_no_stop_strings_hold_nothing() -> None:
    search = StopStrings([])
    assert search.feed("abc") == "abc"
    assert search.flush() == ""
