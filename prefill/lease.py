"""One hand-off of a prefill worker: whose it is, how far it is, what is under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.sequence import Sequence
from protocol.messages import Grant, PeerAddress


class LeaseState(Enum):
    """Where a hand-off stands; ``prefill.handoff`` draws the transitions."""

    QUEUED = auto()
    ASKED = auto()
    SHIPPING = auto()
    DRAINING = auto()
    OFFERED = auto()


@dataclass(slots=True, eq=False)
class Lease:
    """One request's hand-off."""

    sequence: Sequence
    router_id: str
    decode: PeerAddress
    deadline: float
    state: LeaseState = LeaseState.QUEUED
    grant: Grant | None = None
    num_shipped: int = 0  # grant positions given to the transport
    digests: dict[int, int] = field(default_factory=dict)  # by grant position

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.sequence.request_id


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Blocks that the transport may be reading."""

    request_id: str
    blocks: list[int]
