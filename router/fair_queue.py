"""Start-time fair queueing: what waits is served in turns, by the cost of what each client asks.

Every entry has a start tag: the virtual time at which its client may begin it. A client's next
tag is the last one plus the last cost, so that of two clients who both wait, each gets its share
of the cost served, whatever the other adds (Goyal, Vin and Cheng, "Start-time Fair Queuing",
1996). An idle client saves nothing up: it begins at the present virtual time. An entry taken out
unserved costs its client nothing. Pure state: no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One client's entries, oldest first: (cost, item)."""

    start: float  # tag of the first
    entries: deque[tuple[float, T]] = field(default_factory=deque)
    cost: float = 0.0  # of all

    @property
    def last_start(self) -> float:
        return self.start + self.cost - self.entries[-1][0]


class FairQueue(Generic[T]):
    """Items of many clients, each in its client's order. Costs are positive, in any one unit."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane[T]] = {}  # none is empty
        self._owed: dict[str, float] = {}  # next tags of clients that do not wait, if not yet past
        self._virtual = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, client: str, cost: float, item: T) -> None:
        """Add an item behind its client's others."""
        lane = self._lanes.get(client)
        if lane is None:
            lane = self._lanes[client] = _Lane(self._next_start(client))
            self._owed.pop(client, None)
        lane.entries.append((cost, item))
        lane.cost += cost
        self._length += 1

    def head(self) -> T | None:
        """The item whose turn it is; None when nothing waits."""
        lane = self._first()
        return lane[1].entries[0][1] if lane else None

    def pop(self) -> T:
        """Take out the item whose turn it is. Raises IndexError when nothing waits."""
        first = self._first()
        if first is None:
            raise IndexError("nothing waits")
        client, lane = first
        cost, item = lane.entries.popleft()
        self._virtual = lane.start
        lane.start += cost
        self._shrink(client, lane, cost)
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take out an item that will not be served; False if it does not wait."""
        lane = self._lanes.get(client)
        entry = next((e for e in lane.entries if e[1] == item), None) if lane else None
        if lane is None or entry is None:
            return False
        lane.entries.remove(entry)
        self._shrink(client, lane, entry[0])
        return True

    def ahead_of(self, client: str) -> list[T]:
        """The items whose turn comes before that of a new one of ``client``."""
        lane = self._lanes.get(client)
        start = self._next_start(client) if lane is None else lane.start + lane.cost
        ahead: list[T] = []
        for other in self._lanes.values():
            tag = other.start
            for cost, item in other.entries:
                if tag > start:
                    break
                ahead.append(item)
                tag += cost
        return ahead

    def last_behind(self, client: str) -> T | None:
        """The item that waits longest from now, if a new one of ``client`` comes before it."""
        if not self._lanes:
            return None
        mine = self._lanes.get(client)
        start = self._next_start(client) if mine is None else mine.start + mine.cost
        last = max(self._lanes.values(), key=lambda lane: lane.last_start)
        return last.entries[-1][1] if last.last_start > start else None

    def items(self) -> list[T]:
        """Everything that waits, client by client."""
        return [item for lane in self._lanes.values() for _, item in lane.entries]

    def _first(self) -> tuple[str, _Lane[T]] | None:
        return min(self._lanes.items(), key=lambda named: named[1].start, default=None)

    def _next_start(self, client: str) -> float:
        return max(self._virtual, self._owed.get(client, 0.0))

    def _shrink(self, client: str, lane: _Lane[T], cost: float) -> None:
        """An entry has gone."""
        lane.cost -= cost
        self._length -= 1
        if not lane.entries:
            del self._lanes[client]
            self._owed[client] = lane.start
        if not self._lanes:  # nobody competes any more
            self._owed.clear()
            self._virtual = 0.0
        else:
            self._owed = {name: tag for name, tag in self._owed.items() if tag > self._virtual}
