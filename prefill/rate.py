"""How fast this worker computes prompts, as the router's forecasts need it. Pure state."""

from __future__ import annotations

MEMORY = 0.95  # share of the past that one step leaves: some twenty steps count


class PrefillRate:
    """Tokens a second while computing; a step counts for as much as it took."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 until a step has been measured."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def step(self, num_tokens: int, seconds: float) -> None:
        """A step has computed ``num_tokens`` tokens in ``seconds``."""
        self._tokens = MEMORY * self._tokens + num_tokens
        self._seconds = MEMORY * self._seconds + seconds
