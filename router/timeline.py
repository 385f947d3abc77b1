"""Where a sequence's time went, on the router's monotonic clock.

    received ── receive ── tokenise ── router_queue ── prefill ── deliver ── decode ── ended
                                                                          ^
                                                                     first token

    prefill: to_prefill ── prefill_queue ── grant ── prefill
    decode:  transfer ── first_step ── decode

Where decode computes the prompt itself there is no ``prefill_queue``, ``transfer`` or
``first_step``, and ``grant`` is its wait for memory.

One stage follows another without a gap, so the stages up to the first token add up to the time
to first token as the client's stream sees it: ``receive`` is from the request's first byte until
its body has come and is valid, and ``deliver`` from a token's arrival at the router until its
event is written to the client's socket. An attempt that is begun anew waits and prefills again.
Of several sequences from one prompt the others wait (``first_sequence``) for the first one's KV.
Of ``router_queue`` it is told besides how long which pool had no room; both may have none at once.
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

MAX_TIMES = 512  # token times kept of one sequence; even
DIGITS = 6  # microseconds

RECEIVE = "receive"
TOKENISE = "tokenise"
FIRST_SEQUENCE = "first_sequence"
ROUTER_QUEUE = "router_queue"
PREFILL = "prefill"
DELIVER = "deliver"
DECODE = "decode"
DECODE_STAGES = {"transfer", "first_step", DECODE}
PREFILL_STAGES = {"to_prefill", "prefill_queue", "grant", PREFILL}
UNACCOUNTED = {PREFILL: "to_prefill", DECODE: "transfer"}  # of a stage, before a worker's account
WAITING_OR_COMPUTING = {FIRST_SEQUENCE, ROUTER_QUEUE, "prefill_queue", "grant", PREFILL}


class Stage(NamedTuple):
    """A part of a sequence's time."""

    name: str
    start: float  # monotonic seconds
    seconds: float
    attempt: int = 0  # whose it is, counted from 1; 0: before any


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
    received_at: float = field(init=False)  # Unix seconds
    first_token: float | None = None
    last_token: float | None = None
    longest_gap: float = 0.0  # seconds between tokens that came one after the other
    ended: float | None = None
    attempts: list[tuple[str | None, str]] = field(default_factory=list)  # prefill, decode worker
    tokens: TokenTimes = field(default_factory=TokenTimes)
    waited_for: defaultdict[str, float] = field(  # seconds of router queues, by pool
        default_factory=lambda: defaultdict(float)
    )
    _stages: list[Stage] = field(default_factory=list)  # that are over
    _stage: str = RECEIVE  # the present one
    _since: float = field(init=False)
    _token_came: float | None = None  # the first one, to the router

    def __post_init__(self) -> None:
        self._since = self.received
        self.received_at = time.time() - (time.monotonic() - self.received)

    @classmethod
    def begun(cls, received: float, read: float) -> Self:
        """Of a request whose first byte came at ``received`` and whose body was valid at ``read``.

        Monotonic seconds.
        """
        timeline = cls(received)
        timeline.enter(TOKENISE, read)
        return timeline

    @property
    def stage(self) -> str:
        """The stage that the sequence is in, or was in when it ended."""
        return self._stage

    def enter(self, name: str, now: float) -> None:
        """A stage begins, which ends the one before. The first token comes with ``decode``."""
        if name == DECODE and self._token_came is None:
            self._token_came = now
        if now > self._since or not self._stages:
            self._add(self._stage, self._since, now - self._since)
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
        self._add(UNACCOUNTED[self._stage], self._since, before)
        for name, seconds in parts.items():
            taken = min(seconds, now - begun)
            self._add(name, begun, taken)
            begun += taken
        self._since = now
        return before

    def deliver(self, count: int, now: float) -> None:
        """``count`` tokens, at least one, were written to the client.

        Whatever happens meanwhile, from the first token's arrival on it is this that is awaited.
        """
        if self.last_token is None:
            self.first_token = now
            came = self._since if self._token_came is None else self._token_came
            while self._stages and self._stages[-1].start >= came:
                self._stages.pop()
            self._add(DELIVER, came, now - came)
            self._since = now
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
        present = Stage(self._stage, self._since, now - self._since, len(self.attempts))
        return [*self._stages, present]

    def worker(self, stage: Stage) -> str | None:
        """Who had the sequence in this stage; None: the router."""
        if stage.attempt == 0:
            return None
        prefill, decode = self.attempts[stage.attempt - 1]
        if stage.name in DECODE_STAGES:
            return decode
        return (prefill or decode) if stage.name in PREFILL_STAGES else None

    def unix(self, monotonic: float) -> float:
        """A time of this timeline in Unix seconds."""
        return self.received_at + (monotonic - self.received)

    def _add(self, name: str, start: float, seconds: float) -> None:
        self._stages.append(Stage(name, start, seconds, len(self.attempts)))

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None before it."""
        return None if self.first_token is None else self.first_token - self.received

    @property
    def overhead(self) -> float | None:
        """Seconds of the time to first token spent neither waiting for resources nor computing."""
        if self.first_token is None:
            return None
        counted = sum(
            stage.seconds
            for stage in self._stages
            if stage.start < self.first_token and stage.name in WAITING_OR_COMPUTING
        )
        return self.first_token - self.received - counted

    @property
    def transfer(self) -> float | None:
        """Seconds from the first token until decode had the KV; None where nothing was awaited."""
        seconds = [s.seconds for s in self._stages if s.name == UNACCOUNTED[DECODE]]
        return seconds[-1] if seconds else None

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
            "waited_for": {pool: _rounded(seconds) for pool, seconds in self.waited_for.items()},
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
