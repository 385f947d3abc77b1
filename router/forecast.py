"""What the router learns from the requests that end: how long outputs are and how long they take.

Pure state. Means are exponential: after the first few, each request counts for a twentieth.
"""

from __future__ import annotations

WEIGHT = 0.05
FIRST_GUESS = 64  # tokens of output, before any request has ended: decode can cope with more


class Forecast:
    """Forecasts the output of a request and its wait in the router's queue."""

    def __init__(self) -> None:
        self._mean_output: float = FIRST_GUESS  # tokens
        self._mean_time = 0.0  # seconds on the workers
        self._num_ended = 0

    def ended(self, num_output: int, seconds: float) -> None:
        """A request has left the workers after so many tokens and seconds."""
        self._num_ended += 1
        weight = max(WEIGHT, 1 / self._num_ended)
        self._mean_output += weight * (num_output - self._mean_output)
        self._mean_time += weight * (seconds - self._mean_time)

    def output(self, max_tokens: int) -> int:
        """Tokens that a request is expected to generate, of at most ``max_tokens``."""
        return max(1, min(max_tokens, round(self._mean_output)))

    def wait(
        self, *, num_ahead: int, num_running: int, tokens_ahead: int, prefill_rate: float
    ) -> float:
        """Seconds until a request may start; 0 where nothing is known yet.

        The slower of two: prefill takes the tokens ahead at its measured rate; and where decode
        has no place, be it slots or KV, the ``num_running`` requests that fill it free one every
        ``mean time / num_running`` seconds, by Little's law. 0 running: decode has places.
        """
        prefill = tokens_ahead / prefill_rate if prefill_rate else 0.0
        places = (num_ahead + 1) * self._mean_time / num_running if num_running else 0.0
        return max(prefill, places)
