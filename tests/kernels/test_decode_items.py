"""Every way to cut a batch covers each row's visible keys exactly once, within the bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.decode_items import ALONE, MAX_PARTS, PART, TILE, Cut, cut_rows, most_items

LENGTHS = st.one_of(st.integers(0, 2000), st.integers(0, 300_000))


def cut(contexts: list[int], window: int = 0, balance_over: int = 0) -> Cut:
    return cut_rows(np.array(contexts, np.int64), window, balance_over)


@given(
    contexts=st.lists(LENGTHS, max_size=8),
    window=st.sampled_from([0, 1, 100, 4096]),
    balance_over=st.sampled_from([0, 1, 33, 264]),
)
def test_items_cover_the_rows(contexts: list[int], window: int, balance_over: int) -> None:
    result = cut(contexts, window, balance_over)
    lengths = result.items[:, 2] - result.items[:, 1]
    assert (np.diff(lengths) <= 0).all()  # the longest first
    places = []
    for row, context in enumerate(contexts):
        lowest = max(context - window, 0) if window else 0
        parts = sorted(result.items[result.items[:, 0] == row].tolist(), key=lambda item: item[1])
        starts, ends = [part[1] for part in parts], [part[2] for part in parts]
        assert (starts[0], ends[-1]) == (lowest, context)
        assert starts[1:] == ends[:-1]
        assert all(start % TILE == 0 for start in starts[1:])
        assert context == 0 or (np.array(starts) < ends).all()
        assert (len(parts) > 1) == (parts[0][3] != ALONE)
        if len(parts) > 1:
            assert [part[3] for part in parts] == list(range(*result.row_starts[row : row + 2]))
            places += [part[3] for part in parts]
    assert places == list(range(result.row_starts[-1]))
    bound = most_items(len(contexts), max(contexts, default=0), window, balance_over)
    assert len(result.items) <= bound


@given(contexts=st.lists(LENGTHS, min_size=1, max_size=5))
def test_a_row_is_cut_by_its_own_length(contexts: list[int]) -> None:
    together = cut(contexts).items
    for row, context in enumerate(contexts):
        assert (together[together[:, 0] == row, 1:3] == cut([context]).items[:, 1:3]).all()


@pytest.mark.parametrize(
    ("context", "size"),
    [
        (1000, PART),
        (MAX_PARTS * PART, PART),
        (MAX_PARTS * PART + 1, 2 * PART),
        (100_000, 8 * PART),
    ],
)
def test_parts_of_long_rows_grow(context: int, size: int) -> None:
    items = cut([context]).items
    assert items[0, 2] - items[0, 1] == size
    assert len(items) <= MAX_PARTS


def test_balanced_parts_are_about_as_many_as_the_programs() -> None:
    contexts = [100, 5000, 70_000, 33]
    assert 60 <= len(cut(contexts, balance_over=64).items) <= 64 + len(contexts)


def test_no_rows() -> None:
    result = cut([])
    assert result.items.shape == (0, 4)
    assert result.row_starts.tolist() == [0]
