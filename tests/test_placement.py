"""Dividing a host's cores among its workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cli.placement import PIN_FROM, place


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=200, unique=True).map(sorted),
    st.integers(1, 32),
)
def test_every_core_is_shared_out(cores: list[int], num_workers: int) -> None:
    placements = place(cores, num_workers, pin=True)
    shares = [placement.cores or frozenset() for placement in placements]
    assert len(placements) == num_workers
    assert [placement.threads for placement in placements] == [len(share) for share in shares]
    assert frozenset().union(*shares) == frozenset(cores)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if len(cores) >= num_workers:
        assert sum(map(len, shares)) == len(cores)  # none belongs to two workers
    else:
        assert all(len(share) == 1 for share in shares)


def test_workers_of_one_core_are_not_pinned() -> None:
    assert [(p.threads, p.cores) for p in place([0, 1], 2)] == [(1, None), (1, None)]
    assert [p.cores for p in place([0, 1, 2, 3], 2)] == [{0, 1}, {2, 3}]
    assert PIN_FROM == 2


def test_what_the_user_says_wins() -> None:
    assert [(p.threads, p.cores) for p in place([4, 5], 2, threads=3)] == [(3, None), (3, None)]
    assert [p.cores for p in place([4, 5], 2, pin=True)] == [{4}, {5}]
    assert [p.cores for p in place(range(8), 2, pin=False)] == [None, None]
