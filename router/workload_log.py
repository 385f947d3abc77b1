"""The sequences of the last hour as a planner needs them: when they came and how long they were.

Bounded: the last ``MAX_SEQUENCES`` that ended, in arrivals on the router's monotonic clock.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from router.request_log import Record

MAX_SEQUENCES = 10_000
MAX_SECONDS = 3600.0


class Observed(NamedTuple):
    """One sequence that ended. Times are in seconds; ``arrival`` counts from the window's begin."""

    arrival: float
    prompt_tokens: int
    output_tokens: int  # that it got
    cached_tokens: int  # of the prompt, which prefill did not compute
    ttft: float | None  # None: it was turned away or failed before its first token
    tpot: float | None  # None: it got fewer than two tokens
    overhead: float | None  # of the ttft: neither waiting for resources nor computing
    transfer: float | None  # from the first token until decode had the KV


class WorkloadLog:
    """Sequences by their end."""

    def __init__(self) -> None:
        self._ended: deque[Observed] = deque(maxlen=MAX_SEQUENCES)

    def add(self, record: Record) -> None:
        """A sequence is over."""
        timeline = record.timeline
        self._ended.append(
            Observed(
                timeline.received,
                record.num_prompt_tokens,
                timeline.tokens.count,
                record.num_cached_tokens or 0,
                timeline.time_to_first_token,
                timeline.time_per_output_token,
                timeline.overhead,
                timeline.transfer,
            )
        )

    def window(self, seconds: float, now: float, limit: int = MAX_SEQUENCES) -> list[Observed]:
        """At most ``limit`` sequences that came in the last ``seconds``, the oldest first."""
        begin = now - seconds
        recent = (one for one in self._ended if one.arrival >= begin)
        found = sorted(recent, key=lambda one: one.arrival)
        return [
            one._replace(
                arrival=round(one.arrival - begin, 6),
                ttft=_rounded(one.ttft),
                tpot=_rounded(one.tpot),
                overhead=_rounded(one.overhead),
                transfer=_rounded(one.transfer),
            )
            for one in found[-limit:]
        ]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
