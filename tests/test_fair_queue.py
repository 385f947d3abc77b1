"""Fair queueing: everybody gets its share, whatever the others ask for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fair_queue import FairQueue

CLIENTS = "abc"
costs = st.integers(1, 50)
priorities = st.integers(-1, 1)
operations = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "pop", "remove"]),
        st.sampled_from(CLIENTS),
        costs,
        priorities,
    ),
    max_size=60,
)

Item = tuple[str, int, int, int]  # client, priority, number, cost
Step = tuple[str, str, int, int]  # what, client, cost, priority


class Checked:
    """A queue and, beside it, the plainest possible account of what must be in it."""

    def __init__(self) -> None:
        self.queue: FairQueue[Item] = FairQueue()
        self.waiting: list[Item] = []
        self.served: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()  # cost of each client
        self._numbers = 0

    def push(self, client: str, cost: int, priority: int = 0) -> None:
        self._numbers += 1
        item = (client, priority, self._numbers, cost)
        self.queue.push(client, cost, item, priority)
        self.waiting.append(item)
        self.largest[client] = max(self.largest[client], cost)

    def pop(self) -> Item:
        expected = self.queue.head()
        item = self.queue.pop()
        assert item is expected
        assert item == min(i for i in self.waiting if i[0] == item[0])  # its client's next
        self.waiting.remove(item)
        self.served[item[0]] += item[3]
        return item

    def remove(self, client: str) -> None:
        mine = [item for item in self.waiting if item[0] == client]
        if mine:
            item = mine[len(mine) // 2]
            assert self.queue.remove(client, item)
            self.waiting.remove(item)

    def check(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert sorted(self.queue.items()) == sorted(self.waiting)


def play(steps: list[Step]) -> Checked:
    checked = Checked()
    for kind, client, cost, priority in steps:
        if kind == "push":
            checked.push(client, cost, priority)
        elif kind == "remove":
            checked.remove(client)
        elif checked.waiting:
            checked.pop()
        checked.check()
    return checked


@settings(max_examples=200, deadline=None)
@given(steps=operations)
def test_nothing_is_lost_and_each_client_is_served_in_its_order(
    steps: list[Step],
) -> None:
    checked = play(steps)
    while checked.waiting:
        checked.pop()
    assert checked.queue.head() is None
    with pytest.raises(IndexError):
        checked.queue.pop()


@settings(max_examples=200, deadline=None)
@given(steps=operations, sizes=st.lists(costs, min_size=6, max_size=6))
def test_clients_that_wait_get_equal_shares_whatever_went_before(
    steps: list[Step], sizes: list[int]
) -> None:
    """The theorem: two clients' service differs by at most the largest cost of each."""
    checked = play(steps)
    for turn in range(12):
        for number, client in enumerate(CLIENTS):
            checked.push(client, sizes[(turn + number) % len(sizes)])
    checked.served.clear()
    while set(CLIENTS) <= {client for client, *_ in checked.waiting}:
        checked.pop()
        for one in CLIENTS:
            for other in CLIENTS:
                difference = abs(checked.served[one] - checked.served[other])
                assert difference <= checked.largest[one] + checked.largest[other]


@settings(max_examples=200, deadline=None)
@given(flood=st.integers(1, 400), cost=costs, steps=operations)
def test_a_newcomer_waits_for_one_turn_of_the_others_not_for_their_flood(
    flood: int, cost: int, steps: list[Step]
) -> None:
    checked = play(steps)
    for _ in range(flood):
        checked.push("a", cost)
    checked.push("new", cost)
    before = 0
    while checked.pop()[0] != "new":
        before += 1
    others = len({"a", "b", "c"})
    assert before <= others + len(steps)


@settings(max_examples=200, deadline=None)
@given(steps=operations, client=st.sampled_from([*CLIENTS, "new"]), priority=priorities)
def test_what_is_ahead_of_a_newcomer_is_what_is_served_before_it(
    steps: list[Step], client: str, priority: int
) -> None:
    checked = play(steps)
    ahead = set(checked.queue.ahead_of(client, priority))
    behind = checked.queue.last_behind(client, priority)
    assert behind is None or behind not in ahead
    everything = set(checked.waiting)
    assert (behind is None) == (ahead == everything)
    checked.push(client, 1, priority)
    mine = checked.waiting[-1]
    served = set()
    while (item := checked.pop()) != mine:
        served.add(item)
    # Of equal tags the client that was there first is served first, so there may be fewer.
    assert served <= ahead
    tied = ahead - served
    assert len({item[0] for item in tied}) == len(tied)


def test_a_priority_orders_its_clients_own_requests_and_takes_no_others_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for number, priority in enumerate((5, 0, -3, 0)):
        queue.push("a", 10, f"a{number}", priority)
    for number in range(4):
        queue.push("b", 10, f"b{number}")
    assert [queue.pop() for _ in range(8)] == ["a2", "b0", "a1", "b1", "a3", "b2", "a0", "b3"]


def test_what_is_taken_out_unserved_costs_its_client_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 10, "a1")
    queue.push("b", 10, "b1")
    for number in range(50):
        queue.push("a", 10, f"a-out-{number}")
        assert queue.remove("a", f"a-out-{number}")
    queue.push("a", 10, "a2")
    queue.push("b", 10, "b2")
    assert [queue.pop() for _ in range(4)] == ["a1", "b1", "a2", "b2"]
    assert not queue.remove("a", "a1")
    assert not queue.remove("nobody", "a1")


def test_an_idle_client_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(6):
        queue.push("busy", 10, f"busy{number}")
    for _ in range(3):
        queue.pop()
    for number in range(3):
        queue.push("late", 10, f"late{number}")
    turns = [queue.pop()[:4] for _ in range(6)]
    assert Counter(turns[:4]) == {"busy": 2, "late": 2}


def test_a_light_request_overtakes_a_heavy_one_of_another() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("heavy1", "heavy2"):
        queue.push("h", 1000, name)
    for name in ("light1", "light2", "light3"):
        queue.push("l", 10, name)
    assert [queue.pop() for _ in range(5)] == ["heavy1", "light1", "light2", "light3", "heavy2"]
