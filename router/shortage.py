"""For want of which pool the router's queue waits, and for how long in all.

A request starts when both pools have room for it. All that waits behind it waits for the same, so
one account serves every request: it remembers what the account was when its wait began. Pure
state: the clock is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import get_args

from protocol.messages import Role

ROLES: tuple[Role, ...] = get_args(Role)


class Shortage:
    """Seconds without room for the request whose turn it is, by pool; both may be short at once."""

    def __init__(self) -> None:
        self.pools: Set[Role] = frozenset()  # that are short now
        self._since = 0.0
        self._seconds: dict[Role, float] = dict.fromkeys(ROLES, 0.0)  # until then

    def note(self, pools: Set[Role], now: float) -> dict[Role, float]:
        """The pools that are short from now on. Returns the seconds that the former ones were."""
        passed = dict.fromkeys(self.pools, now - self._since)
        for pool, seconds in passed.items():
            self._seconds[pool] += seconds
        self.pools, self._since = pools, now
        return passed

    def seconds(self, now: float) -> dict[Role, float]:
        """The account of all time."""
        present = now - self._since
        return {p: past + present * (p in self.pools) for p, past in self._seconds.items()}

    def since(self, before: Mapping[Role, float], now: float) -> dict[Role, float]:
        """What has come to an account that was ``before``, of the pools that were short."""
        return {p: total - before[p] for p, total in self.seconds(now).items() if total > before[p]}
