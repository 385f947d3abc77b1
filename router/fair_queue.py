"""Start-time fair queueing: what waits is served in turns, by the cost of what each client asks.

Every entry has a start tag: the virtual time at which its client may begin it. A client's next
tag is the last one plus the last cost, so that of two clients who both wait, each gets its share
of the cost served, whatever the other adds (Goyal, Vin and Cheng, "Start-time Fair Queuing",
1996). An idle client saves nothing up: it begins at the present virtual time. An entry taken out
unserved costs its client nothing. A priority orders a client's own entries, the lowest first, and
gives it no turn of another's. Pure state: no clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    priority: int
    cost: float
    item: T


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One client's entries, by priority, then oldest first."""

    start: float  # tag of the first
    entries: list[_Entry[T]] = field(default_factory=list)
    cost: float = 0.0  # of all

    @property
    def last_start(self) -> float:
        return self.start + self.cost - self.entries[-1].cost

    def next_start(self, priority: int) -> float:
        """Tag of a new entry."""
        return self.start + sum(e.cost for e in self.entries if e.priority <= priority)


class FairQueue(Generic[T]):
    """Items of many clients, each in its client's order. Costs are positive, in any one unit."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane[T]] = {}  # none is empty
        self._owed: dict[str, float] = {}  # next tags of clients that do not wait, if not yet past
        self._virtual = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, client: str, cost: float, item: T, priority: int = 0) -> None:
        """Add an item behind its client's others of the same priority."""
        lane = self._lanes.get(client)
        if lane is None:
            lane = self._lanes[client] = _Lane(self._next_start(client))
            self._owed.pop(client, None)
        insort(lane.entries, _Entry(priority, cost, item), key=attrgetter("priority"))
        lane.cost += cost
        self._length += 1

    def head(self) -> T | None:
        """The item whose turn it is; None when nothing waits."""
        lane = self._first()
        return lane[1].entries[0].item if lane else None

    def pop(self) -> T:
        """Take out the item whose turn it is. Raises IndexError when nothing waits."""
        first = self._first()
        if first is None:
            raise IndexError("nothing waits")
        client, lane = first
        entry = lane.entries.pop(0)
        self._virtual = lane.start
        lane.start += entry.cost
        self._shrink(client, lane, entry.cost)
        return entry.item

    def remove(self, client: str, item: T) -> bool:
        """Take out an item that will not be served; False if it does not wait."""
        lane = self._lanes.get(client)
        entry = next((e for e in lane.entries if e.item == item), None) if lane else None
        if lane is None or entry is None:
            return False
        lane.entries.remove(entry)
        self._shrink(client, lane, entry.cost)
        return True

    def ahead_of(self, client: str, priority: int = 0) -> list[T]:
        """The items whose turn comes before that of a new one of ``client``."""
        start = self._start_of(client, priority)
        ahead: list[T] = []
        for name, lane in self._lanes.items():
            tag = lane.start
            for entry in lane.entries:
                behind = entry.priority > priority if name == client else tag > start
                if behind:
                    break
                ahead.append(entry.item)
                tag += entry.cost
        return ahead

    def last_behind(self, client: str, priority: int = 0) -> T | None:
        """The item that waits longest from now, if a new one of ``client`` comes before it."""
        start = self._start_of(client, priority)
        behind = [
            lane
            for name, lane in self._lanes.items()
            if (lane.entries[-1].priority > priority if name == client else lane.last_start > start)
        ]
        last = max(behind, key=attrgetter("last_start"), default=None)
        return last.entries[-1].item if last else None

    def items(self) -> list[T]:
        """Everything that waits, client by client."""
        return [entry.item for lane in self._lanes.values() for entry in lane.entries]

    def _first(self) -> tuple[str, _Lane[T]] | None:
        return min(self._lanes.items(), key=lambda named: named[1].start, default=None)

    def _start_of(self, client: str, priority: int) -> float:
        """Tag of a new entry."""
        lane = self._lanes.get(client)
        return self._next_start(client) if lane is None else lane.next_start(priority)

    def _next_start(self, client: str) -> float:
        """Tag of a client's first entry."""
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
