"""Virtual time: events in order, each a call. Nothing here reads a real clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from planner.workload import Request


class Clock:
    """Runs calls at their times; ``now`` is in seconds. Equal times keep the order of ``at``."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._stopped = False

    def stop(self) -> None:
        """Run no further call."""
        self._stopped = True

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call at ``time``, which is not before ``now``."""
        assert time >= self.now, f"an event at {time} is before {self.now}"
        self._count += 1
        heappush(self._events, (time, self._count, call))

    def run(self, arrivals: Iterable[Request], arrive: Callable[[Request], None]) -> None:
        """Until no event is left, or ``stop``. Arrivals, by time, are read only as they are due."""
        for request in arrivals:
            self._run_to(request.arrival)
            if self._stopped:
                return
            self.now = request.arrival
            arrive(request)
        self._run_to(math.inf)

    def _run_to(self, time: float) -> None:
        while self._events and self._events[0][0] <= time and not self._stopped:
            self._next()

    def _next(self) -> None:
        self.now, _, call = heappop(self._events)
        call()
