"""Where a sequence's time went, on the router's monotonic clock.

    received ── tokenise ── router_queue ── prefill ── deliver ── decode ── deliver ── ended
                                                              ^
                                                         first token

    prefill: to_prefill ── prefill_queue ── grant ── prefill
    decode:  transfer ── first_step ── decode

Where decode computes the prompt itself there is no ``prefill_queue``, ``transfer`` or
``first_step``, and ``grant`` is its wait for memory.

One stage follows another without a gap, so the stages up to the first token add up to the time
to first token as the client's stream sees it. An attempt that is begun anew waits and prefills
again. ``deliver`` is the router's own time: from a token's arrival at the router to its event.
Of several sequences from one prompt the others wait (``first_sequence``) for the first one's KV.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_TIMES = 512  # token times kept of one sequence; even
DIGITS = 6  # microseconds

TOKENISE = "tokenise"
FIRST_SEQUENCE = "first_sequence"
ROUTER_QUEUE = "router_queue"
PREFILL = "prefill"
DELIVER = "deliver"
DECODE = "decode"
UNACCOUNTED = {PREFILL: "to_prefill", DECODE: "transfer"}  # of a stage, before a worker's account


class Stage(NamedTuple):
    """A part of a sequence's time."""

    name: str
    start: float  # monotonic seconds
    seconds: float


class TokenTimes:
    """When tokens came: all of a short output, every second, fourth, ... of a longer one."""

    __slots__ = ("count", "stride", "times")

    def __init__(self) -> None:
        self.count = 0
        self.stride = 1
        self.times = array("d")  # of tokens 0, stride, 2 * stride, ...; monotonic seconds

    def add(self, count: int, now: float) -> None:
        """``count`` tokens came together."""
        for index in range(self.count, self.count + count):
            if index % self.stride == 0:
                if len(self.times) == MAX_TIMES:
                    del self.times[1::2]
                    self.stride *= 2
                self.times.append(now)
        self.count += count


@dataclass(slots=True, eq=False)
class Timeline:
    """One sequence, from the arrival of its request."""

    received: float = field(default_factory=time.monotonic)
    received_at: float = field(default_factory=time.time)  # Unix seconds
    first_token: float | None = None
    last_token: float | None = None
    longest_gap: float = 0.0  # seconds between tokens that came one after the other
    ended: float | None = None
    attempts: list[tuple[str | None, str]] = field(default_factory=list)  # prefill, decode worker
    tokens: TokenTimes = field(default_factory=TokenTimes)
    _stages: list[Stage] = field(default_factory=list)  # that are over
    _stage: str = TOKENISE  # the present one
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.received

    @property
    def stage(self) -> str:
        """The stage that the sequence is in, or was in when it ended."""
        return self._stage

    def enter(self, name: str, now: float) -> None:
        """A stage begins, which ends the one before."""
        if now > self._since or not self._stages:
            self._stages.append(Stage(self._stage, self._since, now - self._since))
        self._stage, self._since = name, now

    def account(self, parts: Mapping[str, float], now: float) -> float:
        """A worker tells the latest parts of the present stage, in order and in seconds.

        The two clocks share only their pace. What the parts leave of the stage came before them:
        so many seconds are returned.
        """
        if not parts:
            return 0.0
        begun = max(self._since, now - sum(parts.values()))
        before = begun - self._since
        self._stages.append(Stage(UNACCOUNTED[self._stage], self._since, before))
        for name, seconds in parts.items():
            taken = min(seconds, now - begun)
            self._stages.append(Stage(name, begun, taken))
            begun += taken
        self._since = now
        return before

    def deliver(self, count: int, now: float) -> None:
        """``count`` tokens, at least one, are ready for the client."""
        if self.last_token is None:
            self.first_token = now
            if self._stages and self._stages[-1].name == DECODE:  # it came while that one lasted
                self._since = self._stages.pop().start
            following, self._stage = self._stage, DELIVER
            self.enter(following, now)
        else:
            self.longest_gap = max(self.longest_gap, now - self.last_token)
        self.last_token = now
        self.tokens.add(count, now)

    def end(self, now: float) -> None:
        """The sequence is over, well or not."""
        self.enter(self._stage, now)
        self.ended = now

    def stages(self, now: float) -> list[Stage]:
        """Every stage in order; the present one of a sequence that goes on lasts until ``now``."""
        if self.ended is not None:
            return list(self._stages)
        return [*self._stages, Stage(self._stage, self._since, now - self._since)]

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None before it."""
        return None if self.first_token is None else self.first_token - self.received

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds of the tokens but the first; None before there are two."""
        if self.first_token is None or self.last_token is None or self.tokens.count < 2:
            return None
        return (self.last_token - self.first_token) / (self.tokens.count - 1)

    def longest_wait(self, now: float) -> float:
        """The longest time in which the client got nothing, in seconds."""
        end = now if self.ended is None else self.ended
        last = self.received if self.last_token is None else self.last_token
        return max(self.time_to_first_token or 0.0, self.longest_gap, end - last)

    def summary(self, now: float) -> dict[str, Any]:
        """The times for a list of sequences; those in seconds are rounded to microseconds."""
        end = now if self.ended is None else self.ended
        return {
            "received": self.received_at,
            "stage": self.stage,
            "attempts": [
                {"prefill": prefill, "decode": decode} for prefill, decode in self.attempts
            ],
            "output_tokens": self.tokens.count,
            "time_to_first_token": _rounded(self.time_to_first_token),
            "time_per_output_token": _rounded(self.time_per_output_token),
            "longest_wait": _rounded(self.longest_wait(now)),
            "seconds": _rounded(end - self.received),
        }

    def details(self, now: float) -> dict[str, Any]:
        """The stages and the tokens, in seconds since the arrival."""
        return {
            "longest_gap": _rounded(self.longest_gap),
            "stages": [
                {
                    "name": stage.name,
                    "start": _rounded(stage.start - self.received),
                    "seconds": _rounded(stage.seconds),
                }
                for stage in self.stages(now)
            ],
            "token_times": {
                "stride": self.tokens.stride,
                "seconds": [_rounded(at - self.received) for at in self.tokens.times],
            },
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, DIGITS)
