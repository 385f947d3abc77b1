"""What joins the simulated processes: time, chance, and messages in channels.

Messages are FIFO within a channel and nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

Deliver = Callable[[], None]


class Network:
    """Everything that the simulated processes share."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 0.0
        self.channels: dict[str, deque[Deliver]] = {}
        self.lost = False  # whether anything that was sent will never arrive

    def post(self, channel: str, deliver: Deliver) -> None:
        """Send a message; ``deliver`` is its arrival."""
        self.channels.setdefault(channel, deque()).append(deliver)

    def deliver(self, channel: str) -> None:
        """The oldest message of a channel arrives."""
        self._take(channel)()

    def lose(self, channel: str) -> None:
        """A full queue or a broken link swallows the oldest message of a channel."""
        self.lost = True
        self._take(channel)

    def _take(self, channel: str) -> Deliver:
        queue = self.channels[channel]
        deliver = queue.popleft()
        if not queue:
            del self.channels[channel]
        return deliver
