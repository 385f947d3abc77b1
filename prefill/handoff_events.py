"""What happens to a hand-off on prefill's side (events), and what it asks for (actions)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sequence import Sequence
from protocol.messages import (
    Accepted,
    Grant,
    GrantRefused,
    Message,
    PeerAddress,
    RequestFailed,
)

Answer = Grant | GrantRefused | Accepted

# Events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """A prompt arrived from ``router_id``; decode is to continue it."""

    sequence: Sequence
    router_id: str
    decode: PeerAddress
    deadline: float

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.sequence.request_id


@dataclass(frozen=True, slots=True)
class Ask:
    """The scheduler wants the grant now."""

    request_id: str


@dataclass(frozen=True, slots=True)
class FromPeer:
    """A decode worker's answer."""

    worker_id: str
    message: Answer


@dataclass(frozen=True, slots=True)
class Computed:
    """A step ended; blocks may have become full, or the prompt finished with its first token."""

    request_id: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Shipped:
    """The transport is done with grant positions [first, first + len(digests))."""

    grant_id: int
    first: int
    digests: list[int]


@dataclass(frozen=True, slots=True)
class ShipFailed:
    """The transport gave up the batch of blocks that begins at grant position ``first``."""

    grant_id: int
    first: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The router lost interest."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RouterLost:
    """A router is gone, or has given this worker up."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Queued | Ask | FromPeer | Computed | Shipped | ShipFailed | Cancelled | RouterLost | Tick

# Actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control message to a decode worker."""

    peer: PeerAddress
    message: Message


@dataclass(frozen=True, slots=True)
class Ship:
    """Send blocks: grant positions [first, first + len(source)) from ``source``."""

    peer: PeerAddress
    grant_id: int
    first: int
    source: list[int]
    destination: list[int]


@dataclass(frozen=True, slots=True)
class Allow:
    """Let the scheduler finish the prompt."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Take the prompt out of the scheduler, if it is still there."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Report:
    """Send the router a failure."""

    router_id: str
    message: RequestFailed


Action = Tell | Ship | Allow | Abandon | Report
