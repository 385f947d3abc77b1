"""How fast something goes, by what was measured of late. Pure state, imports no torch."""

from __future__ import annotations

MEMORY = 0.95  # share of the past that one measurement leaves: some twenty of them count


class Rate:
    """Amount a second while busy; a measurement counts for as much as it took."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    @property
    def per_second(self) -> float:
        """0 until something has been measured."""
        return self._amount / self._seconds if self._seconds else 0.0

    def add(self, amount: float, seconds: float) -> None:
        """``amount`` took ``seconds``."""
        self._amount = MEMORY * self._amount + amount
        self._seconds = MEMORY * self._seconds + seconds
