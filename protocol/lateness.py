"""What one who watches for silence must not blame on others: that it came late itself.

A process whose event loop stood still, or got no processor, has heard nobody meanwhile, however
much was said. So of the time between two looks only as much counts as a punctual watcher would
let pass, and silence takes several looks, between which what has arrived is read.
"""

from __future__ import annotations

MIN_LOOKS = 4  # in a timeout


class Lateness:
    """Of a watcher that looks more than ``MIN_LOOKS`` times in ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self._longest = timeout / MIN_LOOKS  # seconds between two looks that are no lateness
        self._looked: float | None = None

    def look(self, now: float) -> float:
        """Seconds by which this look comes too late after the last one; the first never does."""
        last, self._looked = self._looked, now
        return 0.0 if last is None else max(0.0, now - last - self._longest)
