"""Hand-offs from decode's side: a pure state machine, one grant per request.

    PENDING ──room──> OPEN ──all blocks and the Handoff, verified──> gone (admitted)
                        │
                        └──Revoked, Cancelled, ReceiveFailed, expiry──> CLOSING ──Closed──> gone

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
Blocks are reserved before prefill computes. They are written only while the grant is OPEN, and
given back only once the transport has confirmed (Closed) that no receive into them is left: a
timeout alone frees nothing. What prefill has heard no answer to it repeats, and gets the same
answer. Blocks that do not verify are never read: the sequence is computed anew from its token ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import assert_never

from decode.admission_events import (
    Abandon,
    Action,
    Admit,
    Cancelled,
    Closed,
    CloseReceive,
    Event,
    FromPeer,
    OpenReceive,
    Received,
    ReceiveFailed,
    Reply,
    Report,
    RouterLost,
    Tick,
)
from decode.grant import GrantState, OpenGrant, without_blocks
from decode.terms import disagreement, objection
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.errors import (
    KvferryError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
    WorkerLostError,
)
from protocol.geometry import Fingerprint
from protocol.messages import (
    Accepted,
    Grant,
    GrantRefused,
    GrantRequest,
    Handoff,
    RequestFailed,
    Revoke,
)


class Admission:
    """All grants of one decode worker.

    ``headroom()`` is the scheduler's word on how many blocks a new grant must leave free, or None
    when newcomers have to wait.
    """

    def __init__(
        self,
        pool: BlockPool,
        fingerprint: Fingerprint,
        epoch: int,
        *,
        headroom: Callable[[], int | None],
        grant_timeout: float = 30.0,
        max_pending: int = 1024,
        new_grant_id: Callable[[], int] = lambda: secrets.randbelow(2**32 - 1) + 1,
    ) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._epoch = epoch
        self._headroom = headroom
        self._grant_timeout = grant_timeout
        self._max_pending = max_pending
        self._new_grant_id = new_grant_id
        self._by_request: dict[str, OpenGrant] = {}  # PENDING and OPEN, oldest first
        self._by_id: dict[int, OpenGrant] = {}  # OPEN and CLOSING
        self._accepted: dict[str, tuple[bytes, int]] = {}  # the latest: request to peer, grant id
        self.leaving = False  # no new grants
        self.num_expired = 0
        self.num_stale = 0  # hand-offs without a grant, requests to a former incarnation
        self.integrity_failures: dict[str, int] = {}  # by reason

    @property
    def num_open(self) -> int:
        """Grants that are not over, the pending and closing ones included."""
        pending = sum(g.state is GrantState.PENDING for g in self._by_request.values())
        return pending + len(self._by_id)

    @property
    def num_quarantined_blocks(self) -> int:
        """Blocks of ended grants that the transport has not confirmed free yet."""
        closing = (g for g in self._by_id.values() if g.state is GrantState.CLOSING)
        return sum(len(grant.sequence.block_table) for grant in closing)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists owned here, for ``BlockPool.check_integrity``."""
        return [grant.sequence.block_table for grant in self._by_id.values()]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event."""
        match event:
            case FromPeer():
                return self._from_peer(event.peer, event.message, now)
            case Received():
                return self._received(event, now)
            case ReceiveFailed():
                return self._receive_failed(event)
            case Closed():
                return self._closed(event, now)
            case Cancelled():
                return [*self._drop(event.request_id), Abandon(event.request_id)]
            case RouterLost():
                grants = [g for g in self._by_request.values() if g.router_id == event.router_id]
                return [action for grant in grants for action in self._close(grant)]
            case Tick():
                return [*self._expire(now), *self._grant_pending(now)]
            case _:
                assert_never(event)

    def _from_peer(
        self, peer: bytes, message: GrantRequest | Handoff | Revoke, now: float
    ) -> list[Action]:
        match message:
            case GrantRequest():
                return self._requested(peer, message, now)
            case Handoff():
                return self._offered(peer, message)
            case Revoke():  # once accepted, the request is no longer prefill's to end
                return self._drop(message.request_id)
            case _:
                assert_never(message)

    # A grant's life, in order ----------------------------------------------------------------

    def _requested(self, peer: bytes, request: GrantRequest, now: float) -> list[Action]:
        known = self._by_request.get(request.request_id)
        if known is not None and known.peer == peer:  # it has not heard the answer
            return [self._granted(known, now)] if known.state is GrantState.OPEN else []
        error = self._refusal(request)
        if error is not None:
            refusal = GrantRefused(
                request_id=request.request_id, code=error.code, message=str(error)
            )
            return [Reply(peer, refusal)]
        sequence = Sequence(
            request.request_id, request.token_ids, request.num_prompt_tokens, request.sampling
        )
        deadline = now + request.timeout
        grant = OpenGrant(0, peer, request.router_id, sequence, deadline, expires=deadline)
        self._by_request[request.request_id] = grant
        return self._grant_pending(now)

    def _refusal(self, request: GrantRequest) -> KvferryError | None:
        self.num_stale += request.epoch != self._epoch
        if self.leaving:
            return UnavailableError("this decode worker is leaving")
        if request.request_id in self._by_request:
            return ProtocolError(f"request {request.request_id} has a grant already")
        if len(self._by_request) >= self._max_pending:
            return OverloadedError(f"{self._max_pending} requests wait for KV blocks")
        return objection(request, self._pool, self._fingerprint, self._epoch)

    def _grant_pending(self, now: float) -> list[Action]:
        """Reserve blocks for waiting requests, first come first served, while there is room."""
        actions: list[Action] = []
        for grant in [g for g in self._by_request.values() if g.state is GrantState.PENDING]:
            if not self._reserve(grant):
                break
            grant.state = GrantState.OPEN
            grant.grant_id = self._unused_grant_id()
            grant.expires = min(grant.deadline, now + self._grant_timeout)
            self._by_id[grant.grant_id] = grant
            actions += [OpenReceive(grant.grant_id, grant.blocks), self._granted(grant, now)]
        return actions

    def _granted(self, grant: OpenGrant, now: float) -> Reply:
        message = Grant(
            request_id=grant.sequence.request_id,
            grant_id=grant.grant_id,
            epoch=self._epoch,
            num_cached_tokens=grant.sequence.num_computed,
            blocks=grant.blocks,
            expires_in=grant.expires - now,
        )
        return Reply(grant.peer, message)

    def _reserve(self, grant: OpenGrant) -> bool:
        sequence, headroom = grant.sequence, self._headroom()
        if headroom is None or not self._pool.reserve(sequence, sequence.num_tokens, headroom):
            return False
        grant.blocks = sequence.block_table[sequence.num_computed // self._pool.block_size :]
        return True

    def _received(self, event: Received, now: float) -> list[Action]:
        grant = self._by_id.get(event.grant_id)
        if grant is None or grant.state is not GrantState.OPEN:
            return []
        grant.digests.update(enumerate(event.digests, start=event.first))
        grant.expires = min(grant.deadline, now + self._grant_timeout)
        return self._admit_if_complete(grant)

    def _offered(self, peer: bytes, handoff: Handoff) -> list[Action]:
        if self._accepted.get(handoff.request_id) == (peer, handoff.grant_id):
            return [self._acceptance(peer, handoff)]  # it has not heard the answer
        grant = self._by_request.get(handoff.request_id)
        if grant is None or grant.state is not GrantState.OPEN:
            self.num_stale += 1
            return []
        terms = (
            ("peer", grant.peer, peer),
            ("grant_id", grant.grant_id, handoff.grant_id),
            ("epoch", self._epoch, handoff.epoch),
            ("num_tokens", grant.sequence.num_tokens, handoff.num_tokens),
            ("digests", len(grant.blocks), len(handoff.digests)),
        )
        error = disagreement(terms)
        if error is not None:
            self.integrity_failures["handoff"] = self.integrity_failures.get("handoff", 0) + 1
            return [*self._drop(handoff.request_id), self._failed(grant, error)]
        grant.handoff = handoff
        return self._admit_if_complete(grant)

    def _admit_if_complete(self, grant: OpenGrant) -> list[Action]:
        handoff = grant.handoff
        if handoff is None or len(grant.digests) < len(grant.blocks):
            return []
        sequence = grant.sequence
        intact = all(grant.digests[i] == digest for i, digest in enumerate(handoff.digests))
        if intact:
            sequence.num_computed = sequence.num_tokens
            self._pool.publish(sequence, 0)
            grant.sequence = without_blocks(sequence)  # the blocks now belong to the sequence
        else:
            self.integrity_failures["digest"] = self.integrity_failures.get("digest", 0) + 1
            sequence = without_blocks(sequence)  # the blocks stay with the closing grant
        sequence.token_ids.append(handoff.first_token)
        self._accepted[sequence.request_id] = grant.peer, grant.grant_id
        if len(self._accepted) > self._max_pending:
            del self._accepted[next(iter(self._accepted))]
        admit = Admit(sequence, grant.router_id, grant.deadline)
        return [*self._close(grant), admit, self._acceptance(grant.peer, handoff)]

    def _acceptance(self, peer: bytes, handoff: Handoff) -> Reply:
        accepted = Accepted(request_id=handoff.request_id, grant_id=handoff.grant_id)
        return Reply(peer, accepted)

    # Ends ------------------------------------------------------------------------------------

    def _receive_failed(self, event: ReceiveFailed) -> list[Action]:
        grant = self._by_id.get(event.grant_id)
        if grant is None or grant.state is not GrantState.OPEN:
            return []
        error = WorkerLostError(f"KV transfer failed: {event.reason}")
        return [*self._close(grant), self._failed(grant, error)]

    def _drop(self, request_id: str) -> list[Action]:
        grant = self._by_request.get(request_id)
        return self._close(grant) if grant else []

    def _close(self, grant: OpenGrant) -> list[Action]:
        del self._by_request[grant.sequence.request_id]
        if grant.state is GrantState.PENDING:
            return []
        grant.state = GrantState.CLOSING
        return [CloseReceive(grant.grant_id)]

    def _closed(self, event: Closed, now: float) -> list[Action]:
        grant = self._by_id.get(event.grant_id)
        if grant is None or grant.state is not GrantState.CLOSING:
            return []
        del self._by_id[grant.grant_id]
        self._pool.release_sequence(grant.sequence)
        return self._grant_pending(now)

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for grant in [g for g in self._by_request.values() if now >= g.expires]:
            self.num_expired += 1
            error = grant.expiry(now)
            actions += [*self._close(grant), self._failed(grant, error)]
        return actions

    def _failed(self, grant: OpenGrant, error: KvferryError) -> Report:
        request_id = grant.sequence.request_id
        failed = RequestFailed(request_id=request_id, code=error.code, message=str(error))
        return Report(grant.router_id, failed)

    def _unused_grant_id(self) -> int:
        while (grant_id := self._new_grant_id()) in self._by_id:
            pass
        return grant_id
