"""What happens to a request in the router (events), and what it asks for (actions)."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import KvferryError, OverloadedError
from protocol.messages import FirstToken, TokenUpdate
from router.generation import TokenChunk

# Events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    """Workers were chosen for the next attempt. Without prefill decode computes the prompt."""

    prefill_id: str | None
    decode_id: str


@dataclass(frozen=True, slots=True)
class NoWorkers:
    """No workers could be found for too long."""

    reason: str


@dataclass(frozen=True, slots=True)
class Shed:
    """The request is turned away before it has started."""

    error: OverloadedError


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A worker gave the attempt up."""

    worker_id: str
    error: KvferryError


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is dead or silent."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """A worker ended on purpose, with the attempt unfinished."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request took longer than it may."""


@dataclass(frozen=True, slots=True)
class RouterEnds:
    """The router ends, and with it all that it serves."""


Event = (
    Placed
    | NoWorkers
    | Shed
    | FirstToken
    | TokenUpdate
    | AttemptFailed
    | WorkerLost
    | WorkerLeft
    | ClientGone
    | DeadlinePassed
    | RouterEnds
)

# Actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the client new tokens."""

    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class Fail:
    """Give the client an error."""

    error: KvferryError


@dataclass(frozen=True, slots=True)
class CancelOn:
    """Tell a worker to drop an attempt."""

    worker_id: str
    attempt_id: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Queue the request for another attempt; ``reason`` is a metric's label."""

    reason: str


Action = Deliver | Fail | CancelOn | Retry
