"""The sequences that an operator may ask about: those under way, recent ones, the slowest.

Each one that ends is one line of the process's log.

Bounded whatever the load: under way are at most as many as the router admits, recent are the
last ``MAX_RECENT``, and of each of the last ten minutes the ten whose clients waited longest for
a token are kept.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import RequestNotFoundError
from protocol.logs import about
from router.timeline import Timeline

log = logging.getLogger(__name__)

MAX_RECENT = 1000
MINUTE = 60.0  # seconds
SLOW_MINUTES = 10
SLOW_PER_MINUTE = 10


@dataclass(slots=True, eq=False)
class Record:
    """One sequence of a client's request."""

    sequence_id: str  # the answer's id and the sequence's number in it
    num_prompt_tokens: int
    timeline: Timeline
    traceparent: str = ""  # the client's W3C trace context, if it sent one
    num_cached_tokens: int | None = None  # prompt tokens that prefill did not compute
    finish_reason: str | None = None  # of one that ended well
    outcome: str | None = None  # finish reason, error code or "cancelled"; None: under way

    @property
    def request_id(self) -> str:
        """The answer's id, as the client sees it."""
        return self.sequence_id.rpartition("-")[0]

    def row(self, now: float) -> dict[str, Any]:
        """The record for a list. ``now`` is on the timeline's clock."""
        return {
            "id": self.request_id,
            "sequence": self.sequence_id,
            "outcome": self.outcome,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            **self.timeline.summary(now),
        }

    def line(self) -> tuple[str, dict[str, Any]]:
        """What the log says of a sequence that is over: in words, and its fields."""
        times = self.timeline
        assert times.ended is not None
        stages: dict[str, float] = {}  # ms, of all attempts together
        for stage in times.stages(times.ended):
            stages[stage.name] = stages.get(stage.name, 0.0) + stage.seconds * 1e3
        prefill, decode = times.attempts[-1] if times.attempts else (None, None)
        fields = {
            "sequence": self.sequence_id,
            "outcome": self.outcome,
            "path": None if decode is None else "remote" if prefill else "local",
            "prefill_worker": prefill,
            "decode_worker": decode,
            "attempts": len(times.attempts),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": times.tokens.count,
            "stages_ms": {name: round(ms, 3) for name, ms in stages.items()},
            "waited_for_ms": {pool: round(s * 1e3, 3) for pool, s in times.waited_for.items()},
        }
        where = " and ".join(worker for worker in (prefill, decode) if worker) or "no worker"
        spent = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
        tokens = f"{self.num_prompt_tokens} + {times.tokens.count} tokens"
        return f"{self.outcome}: {tokens} on {where}; ms: {spent}", fields


@dataclass(slots=True)
class _SlowMinute:
    """The slowest sequences that ended in one minute: a heap with the fastest of them first."""

    number: int
    heap: list[tuple[float, int, Record]] = field(default_factory=list)

    def add(self, order: int, record: Record, wait: float) -> None:
        item = (wait, order, record)
        if len(self.heap) < SLOW_PER_MINUTE:
            heapq.heappush(self.heap, item)
        else:
            heapq.heappushpop(self.heap, item)


class RequestLog:
    """What is known of sequences under way and of some that have ended."""

    def __init__(self) -> None:
        self._running: dict[Record, None] = {}  # in order of arrival
        self._recent: deque[Record] = deque(maxlen=MAX_RECENT)
        self._slow: deque[_SlowMinute] = deque(maxlen=SLOW_MINUTES)
        self._num_ended = 0

    def begin(self, record: Record) -> None:
        """A sequence was tokenised."""
        self._running[record] = None

    def end(self, record: Record, outcome: str, now: float) -> None:
        """A sequence that began is over."""
        del self._running[record]
        record.outcome = outcome
        record.timeline.end(now)
        self._recent.append(record)
        self._num_ended += 1
        minute = int(now // MINUTE)
        if not self._slow or self._slow[-1].number != minute:
            self._slow.append(_SlowMinute(minute))
        self._slow[-1].add(self._num_ended, record, record.timeline.longest_wait(now))
        if log.isEnabledFor(logging.INFO):
            words, fields = record.line()
            extra = about(record.sequence_id, **fields)
            log.info("request %s %s", record.sequence_id, words, extra=extra)

    def stages(self) -> dict[str, int]:
        """How many sequences are in each stage now."""
        return dict(Counter(record.timeline.stage for record in self._running))

    def running(self, limit: int) -> list[Record]:
        """Sequences under way, the oldest first."""
        return [record for record, _ in zip(self._running, range(limit), strict=False)]

    def recent(self, limit: int) -> list[Record]:
        """Sequences that ended, the last first."""
        return [record for record, _ in zip(reversed(self._recent), range(limit), strict=False)]

    def slowest(self, limit: int, now: float) -> list[Record]:
        """Sequences of the last minutes that left their clients waiting, the longest first."""
        first = int(now // MINUTE) - SLOW_MINUTES
        items = [item for minute in self._slow if minute.number > first for item in minute.heap]
        return [record for _, _, record in heapq.nlargest(limit, items)]

    def find(self, request_id: str) -> list[Record]:
        """The sequences of an answer, or the one with this id. Raises RequestNotFoundError."""
        found = {r: None for r in self._all() if request_id in (r.request_id, r.sequence_id)}
        if not found:
            raise RequestNotFoundError(
                f"request {request_id!r} is neither under way nor among the last {MAX_RECENT} "
                "nor among the slowest of the last minutes"
            )
        return sorted(found, key=lambda record: record.sequence_id)

    def _all(self) -> Iterator[Record]:
        yield from self._running
        yield from self._recent
        for minute in self._slow:
            yield from (record for _, _, record in minute.heap)
