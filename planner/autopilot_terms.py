"""The words of the autopilot: what it sees, what it may do, what it decides and remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.observed import Row
from planner.outcome import Slo
from planner.workload import Request
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pools:
    """How many workers serve in each role, and the longest prompt that decode computes itself.

    The latter is None where it is not to be changed: the router leaves all prompts to prefill.
    """

    prefill: int
    decode: int
    local_prefill_tokens: int | None = None

    @property
    def num_workers(self) -> int:
        """Of both."""
        return self.prefill + self.decode

    def __str__(self) -> str:
        local = self.local_prefill_tokens
        own = f" with prompts of up to {local} tokens on decode" if local else ""
        return f"{self.prefill}P{self.decode}D{own}"


Predict = Callable[[Sequence[Request], Pools], float]  # the share of requests within the SLO
Kind = Literal["forecast", "misses", "workers", "idle"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator wants. Times in seconds. Workers are added and removed between two bounds.

    Without bounds only roles change.
    """

    slo: Slo
    window: float = 600.0  # that a forecast looks back
    recent: float = 60.0  # that a reaction looks back
    forecast_every: float = 60.0
    react_every: float = 15.0  # while deadlines are missed
    cool_down: float = 60.0  # between two changes
    margin: float = 0.02  # of attainment that a change without new workers must promise
    far_margin: float = 0.1  # the same while nothing comes near the SLO
    slack: float = 0.8  # share of what pools carry that a forecast lets the load be
    workers: tuple[int, int] | None = None  # the fewest, the most

    def __post_init__(self) -> None:
        if self.workers is not None and not 2 <= self.workers[0] <= self.workers[1]:
            raise ConfigError("the fewest workers must be at least 2 and not above the most")
        if min(self.recent, self.forecast_every, self.cool_down) <= 0 or not 0 < self.slack <= 1:
            raise ConfigError("an autopilot's times and slack must be above 0, slack at most 1")
        if self.window < self.cool_down:
            raise ConfigError("an autopilot must look back for a cool-down at least")


@dataclass(frozen=True, slots=True)
class Observation:
    """A running system at one moment.

    ``rows`` are the requests that ended, ``queued`` those that no worker has yet, of those that
    came in the last ``Limits.window`` seconds, by arrival, which counts from the window's begin.
    """

    pools: Pools
    rows: Sequence[Row]
    queued: Sequence[Row] = ()
    wait: float = 0.0  # seconds that a prompt which comes now would queue
    num_open: int = 0  # requests under way, the queued ones included
    changing: bool = False  # an earlier change is


@dataclass(frozen=True, slots=True)
class Decision:
    """Other pools, and why. Attainments are shares of requests; None where nothing is known."""

    at: float
    kind: Kind
    present: Pools
    wanted: Pools
    reason: str
    predicted: float | None
    outcome: float | None = None  # of the requests that came in the cool-down after it


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one look to the next."""

    forecast_due: float
    react_due: float = 0.0
    changed: float | None = None
    direction: tuple[int, int] = (0, 0)  # of the last change of roles, of the longest prompt's
    allowed: range | None = None  # prefill workers of the ratios that the forecast finds good
    unjudged: tuple[Decision, ...] = ()

    @classmethod
    def at_start(cls, now: float, limits: Limits) -> State:
        """Nothing known: the first forecast waits for a cool-down, reactions wait for it."""
        due = now + limits.cool_down
        return cls(forecast_due=due, react_due=due)
