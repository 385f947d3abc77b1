"""Hand-offs from decode's side: a pure state machine, one grant per request.

    PENDING ──room──> OPEN ──all blocks and the Handoff, verified──> gone (admitted)
                        │
                        └──Revoked, Cancelled, ReceiveFailed, expiry──> CLOSING ──Closed──> gone

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
Blocks are reserved before prefill computes. They are written only while the grant is OPEN, and
given back only once the transport has confirmed (Closed) that no receive into them is left: a
timeout alone frees nothing. What prefill has heard no answer to it repeats, and gets the same
answer. Blocks that do not verify, or never come, are not read: the sequence is computed anew from
its token ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import assert_never

from decode.acceptances import Acceptances
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
    GrantRefused,
    GrantRequest,
    Handoff,
    RequestFailed,
    Revoke,
)

LATE_BLOCKS = 2.0  # seconds that blocks may come after the Handoff, or after one another then


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
        vocab_size: int,
        headroom: Callable[[], int | None],
        grant_timeout: float = 30.0,
        max_pending: int = 1024,
        new_grant_id: Callable[[], int] = lambda: secrets.randbelow(2**32 - 1) + 1,
    ) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._epoch = epoch
        self._vocab_size = vocab_size
        self._headroom = headroom
        self._grant_timeout = grant_timeout
        self._max_pending = max_pending
        self._new_grant_id = new_grant_id
        self._by_request: dict[str, OpenGrant] = {}  # PENDING and OPEN, oldest first
        self._by_id: dict[int, OpenGrant] = {}  # OPEN and CLOSING
        self._acceptances = Acceptances(max_pending)
        self.leaving = False  # no new grants
        self.num_expired = 0
        self.num_stale = 0  # hand-offs without a grant, requests to a former incarnation
        self.integrity_failures: dict[str, int] = {}  # by reason

    @property
    def num_requests(self) -> int:
        """Requests that wait for a grant or have an open one."""
        return len(self._by_request)

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
                return self._offered(peer, message, now)
            case Revoke():
                return self._revoked(peer, message)
            case _:
                assert_never(message)

    # A grant's life, in order ----------------------------------------------------------------

    def _requested(self, peer: bytes, request: GrantRequest, now: float) -> list[Action]:
        known = self._by_request.get(request.request_id)
        if known is not None and known.peer == peer:  # it has not heard the answer
            if known.state is GrantState.PENDING:
                return []
            return [Reply(peer, known.message(self._epoch, now))]
        error = self._refusal(request)
        if error is not None:
            refusal = GrantRefused(
                request_id=request.request_id, code=error.code, message=str(error)
            )
            return [Reply(peer, refusal)]
        sequence = Sequence(
            request.request_id,
            request.token_ids,
            request.num_prompt_tokens,
            request.sampling,
            cache_salt=request.cache_salt,
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
        if self._fingerprint != request.fingerprint:
            self._count_failure("fingerprint")
        return objection(request, self._pool, self._fingerprint, self._epoch, self._vocab_size)

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
            told = Reply(grant.peer, grant.message(self._epoch, now))
            actions += [OpenReceive(grant.grant_id, grant.blocks), told]
        return actions

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
        patience = LATE_BLOCKS if grant.handoff else self._grant_timeout
        grant.expires = min(grant.deadline, now + patience)
        return self._admit_if_complete(grant)

    def _offered(self, peer: bytes, handoff: Handoff, now: float) -> list[Action]:
        answer = self._acceptances.repeat(peer, handoff)
        if answer is not None:
            return [Reply(peer, answer)]
        grant = self._by_request.get(handoff.request_id)
        if grant is None or grant.state is not GrantState.OPEN or grant.peer != peer:
            self.num_stale += 1
            return []
        error = disagreement(grant, handoff, self._epoch, self._vocab_size)
        if error is not None:
            self._count_failure("handoff")
            return [*self._drop(handoff.request_id), self._failed(grant, error)]
        if grant.handoff is None:  # everything was sent: what is missing must be close behind
            grant.handoff = handoff
            grant.expires = min(grant.expires, now + LATE_BLOCKS)
        return self._admit_if_complete(grant)

    def _admit_if_complete(self, grant: OpenGrant) -> list[Action]:
        handoff = grant.handoff
        if handoff is None or len(grant.digests) < len(grant.blocks):
            return []
        if any(grant.digests[i] != digest for i, digest in enumerate(handoff.digests)):
            return self._admit(grant, handoff, failure="digest")
        return self._admit(grant, handoff)

    def _admit(
        self, grant: OpenGrant, handoff: Handoff, failure: str | None = None
    ) -> list[Action]:
        """Let decode have the sequence; after a failure it computes everything anew."""
        sequence = grant.sequence
        if failure is None:
            sequence.num_computed = sequence.num_tokens
            self._pool.publish(sequence, 0)
            grant.sequence = without_blocks(sequence)  # the blocks now belong to the sequence
        else:
            self._count_failure(failure)
            sequence = without_blocks(sequence)  # the blocks stay with the closing grant
        sequence.token_ids.append(handoff.first_token)
        answer = self._acceptances.accept(grant.peer, handoff)
        admit = Admit(sequence, grant.router_id, grant.deadline)
        return [*self._close(grant), admit, Reply(grant.peer, answer)]

    # Ends ------------------------------------------------------------------------------------

    def _receive_failed(self, event: ReceiveFailed) -> list[Action]:
        grant = self._by_id.get(event.grant_id)
        if grant is None or grant.state is not GrantState.OPEN:
            return []
        error = WorkerLostError(f"KV transfer failed: {event.reason}")
        return [*self._close(grant), self._failed(grant, error)]

    def _revoked(self, peer: bytes, revoke: Revoke) -> list[Action]:
        """Once accepted, the request is no longer prefill's to end."""
        grant = self._by_request.get(revoke.request_id)
        if grant is not None and grant.peer == peer:
            return self._close(grant)
        self.num_stale += grant is not None
        return []

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
            if grant.handoff is not None and now < grant.deadline:
                actions += self._admit(grant, grant.handoff, failure="missing")
                continue
            self.num_expired += 1
            error = grant.expiry(now)
            actions += [*self._close(grant), self._failed(grant, error)]
        return actions

    def _count_failure(self, reason: str) -> None:
        self.integrity_failures[reason] = self.integrity_failures.get(reason, 0) + 1

    def _failed(self, grant: OpenGrant, error: KvferryError) -> Report:
        request_id = grant.sequence.request_id
        failed = RequestFailed(request_id=request_id, code=error.code, message=str(error))
        return Report(grant.router_id, failed)

    def _unused_grant_id(self) -> int:
        while (grant_id := self._new_grant_id()) in self._by_id:
            pass
        return grant_id
