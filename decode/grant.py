"""One grant of a decode worker: whose it is, what it reserves, how far it is; and all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.sequence import Sequence
from protocol.errors import (
    DeadlineError,
    KvferryError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
    WorkerLostError,
)
from protocol.messages import Grant, Handoff

CANCELS_KEPT = 1024  # of requests that prefill may ask for yet


class GrantState(Enum):
    """Where a grant stands; ``decode.admission`` draws the transitions."""

    PENDING = auto()
    OPEN = auto()
    CLOSING = auto()


@dataclass(slots=True, eq=False)
class OpenGrant:
    """One request's reservation. ``sequence.block_table`` holds the reserved blocks."""

    peer: bytes | None  # who hands off; None: nobody, decode computes the prompt
    router_id: str
    sequence: Sequence
    asked: float
    deadline: float
    expires: float
    grant_id: int = 0  # from OPEN on
    state: GrantState = GrantState.PENDING
    num_held_tokens: int = 0  # of whole blocks that need not be sent under this grant
    num_to_load: int = 0  # blocks that a tier is to bring back
    num_loaded: int | None = None  # of those, from the first on; None: it is still at it
    blocks: list[int] = field(default_factory=list)  # destinations, without what is held
    digests: dict[int, int] = field(default_factory=dict)  # of received blocks, by position
    handoff: Handoff | None = None
    leader: OpenGrant | None = None  # under which some of its blocks come, until that has ended
    followers: list[OpenGrant] = field(default_factory=list)  # that it leads
    whole: bool = False  # all of its blocks are here and verified
    lost: bool = False  # what it shared with its leader did not come

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.sequence.request_id

    @property
    def held_whole(self) -> bool:
        """Whether a tier has brought back all that it was to, and its leader was sent its own."""
        return self.num_to_load == (self.num_loaded or 0) and not self.lost

    @property
    def complete(self) -> bool:
        """Whether everything has come that can come."""
        loaded = self.num_to_load == 0 or self.num_loaded is not None
        received = len(self.digests) == len(self.blocks) and self.leader is None
        return self.handoff is not None and loaded and received

    def message(self, epoch: int, now: float) -> Grant:
        """What prefill is told of it."""
        return Grant(
            request_id=self.request_id,
            grant_id=self.grant_id,
            epoch=epoch,
            num_cached_tokens=self.num_held_tokens,
            blocks=self.blocks,
            expires_in=self.expires - now,
        )

    def expiry(self, now: float) -> KvferryError:
        """Why the grant ends at its expiry."""
        if now >= self.deadline:
            state = self.state.name.lower()
            return DeadlineError(f"the request's deadline passed in decode ({state})")
        return WorkerLostError("prefill sent nothing under its grant for too long")


class Grants:
    """All grants of one decode worker: those of a request, and those that may still receive."""

    def __init__(self, new_id: Callable[[], int], max_requests: int) -> None:
        self._new_id = new_id
        self._max_requests = max_requests
        self._by_request: dict[str, OpenGrant] = {}  # PENDING and OPEN, oldest first
        self._by_id: dict[int, OpenGrant] = {}  # OPEN and CLOSING
        self._cancelled: dict[str, None] = {}  # requests, the latest last
        self.leaving = False  # no new ones

    @property
    def num_requests(self) -> int:
        """Requests that wait for a grant or have an open one."""
        return len(self._by_request)

    @property
    def num_open(self) -> int:
        """Grants that are not over, the pending and closing ones included."""
        return len(self.pending()) + len(self._by_id)

    @property
    def num_quarantined_blocks(self) -> int:
        """Blocks of ended grants that the transport has not confirmed free yet."""
        closing = (g for g in self._by_id.values() if g.state is GrantState.CLOSING)
        return sum(len(grant.sequence.block_table) for grant in closing)

    @property
    def pending_tokens(self) -> int:
        """Tokens of the pending requests whose prompts decode is to compute."""
        return sum(g.sequence.num_tokens for g in self.pending() if g.peer is None)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists owned here, for ``BlockPool.check_integrity``."""
        return [grant.sequence.block_table for grant in self._by_id.values()]

    def of_request(self, request_id: str) -> OpenGrant | None:
        """The request's grant, PENDING or OPEN."""
        return self._by_request.get(request_id)

    def of_router(self, router_id: str) -> list[OpenGrant]:
        """Grants, PENDING or OPEN, whose tokens a router waits for."""
        return [g for g in self._by_request.values() if g.router_id == router_id]

    def pending(self) -> list[OpenGrant]:
        """Grants without blocks, oldest first."""
        return [g for g in self._by_request.values() if g.state is GrantState.PENDING]

    def of_requests(self) -> list[OpenGrant]:
        """All grants, PENDING or OPEN, oldest first."""
        return [*self._by_request.values()]

    def numbered(self, grant_id: int) -> OpenGrant | None:
        """The grant of that number, OPEN or CLOSING."""
        return self._by_id.get(grant_id)

    def refusal(self, request_id: str) -> KvferryError | None:
        """Why a request gets no grant, not even one to wait for; None if it does."""
        if self.leaving:
            return UnavailableError("this decode worker is leaving")
        if request_id in self._cancelled:
            return UnavailableError(f"request {request_id} was cancelled")
        if request_id in self._by_request:
            return ProtocolError(f"request {request_id} has a grant already")
        if len(self._by_request) >= self._max_requests:
            return OverloadedError(f"{self._max_requests} requests wait for KV blocks")
        return None

    def cancel(self, request_id: str) -> None:
        """Remember that a request is over: prefill may ask for it yet, on another connection."""
        self._cancelled[request_id] = None
        if len(self._cancelled) > CANCELS_KEPT:
            del self._cancelled[next(iter(self._cancelled))]

    def add(self, grant: OpenGrant) -> None:
        """A request waits for its blocks."""
        self._by_request[grant.request_id] = grant

    def open(self, grant: OpenGrant) -> None:
        """It has them: from now on they are known by a number, new among those in use."""
        while (grant_id := self._new_id()) in self._by_id:
            pass
        grant.grant_id, grant.state = grant_id, GrantState.OPEN
        self._by_id[grant_id] = grant

    def close(self, grant: OpenGrant) -> bool:
        """The request is done with it. True: it was open, and its blocks may still be written."""
        del self._by_request[grant.request_id]
        if grant.state is GrantState.PENDING:
            return False
        grant.state = GrantState.CLOSING
        return True

    def forget(self, grant: OpenGrant) -> None:
        """No receive into a closing grant's blocks is left."""
        del self._by_id[grant.grant_id]


def without_blocks(sequence: Sequence) -> Sequence:
    """The same request, to be computed from its tokens."""
    return Sequence(
        sequence.request_id,
        list(sequence.token_ids),
        sequence.num_prompt_tokens,
        sequence.sampling,
        cache_salt=sequence.cache_salt,
        priority=sequence.priority,
    )
