"""What happens to a grant on decode's side (events), and what it asks for (actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.sequence import Sequence
from protocol.errors import KvferryError
from protocol.messages import (
    GenerateRequest,
    GrantRefused,
    GrantRequest,
    Handoff,
    Message,
    RequestFailed,
    Revoke,
)

# Events ------------------------------------------------------------------------------------


Offer = GrantRequest | Handoff | Revoke
AnyOffer = TypeVar("AnyOffer", bound=Offer, covariant=True)


@dataclass(frozen=True, slots=True)
class FromPeer(Generic[AnyOffer]):
    """A prefill worker sent a message."""

    peer: bytes
    message: AnyOffer


@dataclass(frozen=True, slots=True)
class Asked:
    """A router wants a request's prompt computed here, too."""

    router_id: str
    request: GenerateRequest

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class Received:
    """Blocks of a grant are in place."""

    grant_id: int
    first: int
    digests: list[int]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tier has given a grant what it still had: ``num_blocks``, from the first on."""

    grant_id: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """A receive under the grant ended without its data."""

    grant_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """No receive under the grant is left; its blocks may be reused."""

    grant_id: int


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
    """Time passed or blocks became free."""


OfGrant = Received | Loaded | ReceiveFailed | Closed
Event = FromPeer[Offer] | Asked | OfGrant | Cancelled | RouterLost | Tick

# Actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a control message to a prefill worker."""

    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class OpenReceive:
    """Let the transport write these blocks under the grant."""

    grant_id: int
    blocks: list[int]
    sender: bytes  # the peer that hands off


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Let the tiers fill ``count`` blocks after the sequence's computed ones; answers: Loaded."""

    grant_id: int
    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class CloseReceive:
    """Stop the transport from writing under the grant; it answers with Closed."""

    grant_id: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the sequence to the scheduler, which computes what its blocks do not hold.

    ``waited`` seconds for them, if nobody handed it off; without blocks it is computed anew.
    """

    sequence: Sequence
    router_id: str
    deadline: float
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class Abandon:
    """Take the sequence out of the scheduler, if it is there."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Report:
    """Send the router a failure."""

    router_id: str
    message: RequestFailed


Action = Reply | OpenReceive | LoadBlocks | CloseReceive | Admit | Abandon | Report
Actions = list[Action]


def refused(peer: bytes, request_id: str, error: KvferryError) -> Reply:
    """Tell prefill that there will be no grant."""
    message = GrantRefused(request_id=request_id, code=error.code, message=str(error))
    return Reply(peer, message)


def failed(router_id: str, request_id: str, error: KvferryError) -> Report:
    """Tell a router that its request ends here."""
    message = RequestFailed(request_id=request_id, code=error.code, message=str(error))
    return Report(router_id, message)
