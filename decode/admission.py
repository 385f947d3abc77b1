"""How requests come into decode: a pure state machine, one grant per request.

    PENDING ──room──> OPEN ──all blocks and the Handoff, verified──> gone (admitted)
       │                │
       │                └──Revoked, Cancelled, ReceiveFailed, expiry──> CLOSING ──Closed──> gone
       └──room, and decode computes the prompt itself──> gone (admitted)

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
``TRANSITIONS`` names what every event does in every state.
Blocks are reserved before prefill computes. They are written only while the grant is OPEN, and
given back only once the transport has confirmed (Closed) that no receive into them is left: a
timeout alone frees nothing. What prefill has heard no answer to it repeats, and gets the same
answer. Blocks that do not verify, or never come, are not read: the sequence is computed anew from
its token ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, assert_never

from decode.acceptances import Acceptances
from decode.admission_events import (
    Abandon,
    Action,
    Admit,
    Asked,
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
from decode.grant import Grants, GrantState, OpenGrant, without_blocks
from decode.room import Room
from decode.terms import disagreement, misfit, objection
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.errors import KvferryError, UnavailableError, WorkerLostError
from protocol.geometry import Fingerprint
from protocol.messages import (
    Continuation,
    GrantRefused,
    GrantRequest,
    Handoff,
    RequestFailed,
    Revoke,
)

LATE_BLOCKS = 2.0  # seconds that blocks may come after the Handoff, or after one another then


class Admission:
    """What one decode worker lets in. ``headroom()``: see ``decode.room``."""

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
        self._grant_timeout = grant_timeout
        self.room = Room(pool, headroom)
        self.grants = Grants(new_grant_id, max_pending)
        self._acceptances = Acceptances(max_pending)
        self.leaving = False  # no new grants
        self.num_expired = 0
        self.num_stale = 0  # hand-offs without a grant, requests to a former incarnation
        self.integrity_failures: dict[str, int] = {}  # by reason

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event.

        Raises ValueError for one that cannot be in the state of its grant.
        """
        match event:
            case FromPeer():
                grant = self.grants.of_request(event.message.request_id)
                given = grant is not None and grant.peer == event.peer
                return self._advance(grant if given else None, event, now)
            case Asked() | Cancelled():
                return self._advance(self.grants.of_request(event.request_id), event, now)
            case Received() | ReceiveFailed() | Closed():
                return self._advance(self.grants.numbered(event.grant_id), event, now)
            case RouterLost():
                return self._advance_all(self.grants.of_router(event.router_id), event, now)
            case Tick():
                ended = self._advance_all(self.grants.of_requests(), event, now)
                return [*ended, *self._grant_pending(now)]
            case _:
                assert_never(event)

    def _advance_all(
        self, grants: Iterable[OpenGrant], event: Tick | RouterLost, now: float
    ) -> list[Action]:
        return [action for grant in grants for action in self._advance(grant, event, now)]

    def _advance(self, grant: OpenGrant | None, event: Event, now: float) -> list[Action]:
        state = grant.state if grant is not None else None
        kind = type(event.message) if isinstance(event, FromPeer) else type(event)
        transition = TRANSITIONS[state].get(kind)
        if transition is None:
            where = f"while {state.name}" if state else "without a grant"
            raise ValueError(f"{kind.__name__} {where}")
        return transition(self, grant, event, now)

    # Transitions -----------------------------------------------------------------------------

    def _requested(self, _: None, event: FromPeer[GrantRequest], now: float) -> list[Action]:
        peer, request = event.peer, event.message
        self.num_stale += request.epoch != self._epoch
        error = self._refusal(request) or self._objection(request)
        if error is not None:
            refusal = GrantRefused(
                request_id=request.request_id, code=error.code, message=str(error)
            )
            return [Reply(peer, refusal)]
        return self._queue(request, request.router_id, peer, now)

    def _requested_again(
        self, grant: OpenGrant, event: FromPeer[GrantRequest], now: float
    ) -> list[Action]:
        return [Reply(event.peer, grant.message(self._epoch, now))]  # it has not heard the answer

    def _asked(self, _: OpenGrant | None, event: Asked, now: float) -> list[Action]:
        request = event.request
        error = self._refusal(request) or misfit(request, self._pool, self._vocab_size)
        if error is not None:
            return [_failed(request.request_id, event.router_id, error)]
        return self._queue(request, event.router_id, None, now)

    def _received(self, grant: OpenGrant, event: Received, now: float) -> list[Action]:
        grant.digests.update(enumerate(event.digests, start=event.first))
        patience = LATE_BLOCKS if grant.handoff else self._grant_timeout
        grant.expires = min(grant.deadline, now + patience)
        return self._admit_if_complete(grant)

    def _receive_failed(self, grant: OpenGrant, event: ReceiveFailed, now: float) -> list[Action]:
        return self._fail(grant, WorkerLostError(f"KV transfer failed: {event.reason}"))

    def _offered(self, grant: OpenGrant, event: FromPeer[Handoff], now: float) -> list[Action]:
        handoff = event.message
        if self._acceptances.repeat(event.peer, handoff) is not None:
            return self._offered_again(grant, event, now)
        error = disagreement(grant, handoff, self._epoch, self._vocab_size)
        if error is not None:
            self._count_failure("handoff")
            return self._fail(grant, error)
        if grant.handoff is None:  # everything was sent: what is missing must be close behind
            grant.handoff = handoff
            grant.expires = min(grant.expires, now + LATE_BLOCKS)
        return self._admit_if_complete(grant)

    def _offered_again(
        self, _: OpenGrant | None, event: FromPeer[Handoff], now: float
    ) -> list[Action]:
        answer = self._acceptances.repeat(event.peer, event.message)
        self.num_stale += answer is None
        return [Reply(event.peer, answer)] if answer is not None else []

    def _revoked_in_vain(self, _: None, event: FromPeer[Revoke], now: float) -> list[Action]:
        """Once accepted, the request is no longer prefill's to end; nor is another peer's."""
        self.num_stale += self.grants.of_request(event.message.request_id) is not None
        return []

    def _cancelled(self, grant: OpenGrant | None, event: Cancelled, now: float) -> list[Action]:
        self.grants.cancel(event.request_id)
        closing = self._close(grant) if grant is not None else []
        return [*closing, Abandon(event.request_id)]

    def _expired(self, grant: OpenGrant, _: Tick, now: float) -> list[Action]:
        if now < grant.expires:
            return []
        if grant.handoff is not None and now < grant.deadline:
            return self._admit(grant, grant.handoff, failure="missing")
        self.num_expired += 1
        return self._fail(grant, grant.expiry(now))

    def _end(self, grant: OpenGrant, _: FromPeer[Revoke] | RouterLost, now: float) -> list[Action]:
        return self._close(grant)

    def _closed(self, grant: OpenGrant, _: Closed, now: float) -> list[Action]:
        self.grants.forget(grant)
        self._pool.release_sequence(grant.sequence)
        return self._grant_pending(now)

    def _ignore(self, _grant: OpenGrant | None, _: Event, now: float) -> list[Action]:
        return []

    # What they share -------------------------------------------------------------------------

    def _refusal(self, request: Continuation) -> KvferryError | None:
        if self.leaving:
            return UnavailableError("this decode worker is leaving")
        return self.grants.refusal(request.request_id)

    def _objection(self, request: GrantRequest) -> KvferryError | None:
        if self._fingerprint != request.fingerprint:
            self._count_failure("fingerprint")
        return objection(request, self._pool, self._fingerprint, self._epoch, self._vocab_size)

    def _queue(
        self, request: Continuation, router_id: str, peer: bytes | None, now: float
    ) -> list[Action]:
        sequence, deadline = Sequence.of(request), now + request.timeout
        self.grants.add(OpenGrant(peer, router_id, sequence, now, deadline, expires=deadline))
        return self._grant_pending(now)

    def _grant_pending(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for grant in self.room.let_in(self.grants.pending()):
            if grant.peer is None:
                actions.append(self._admit_prompt(grant, now))
            else:
                actions += self._open(grant, grant.peer, now)
        return actions

    def _admit_prompt(self, grant: OpenGrant, now: float) -> Admit:
        """Let decode have a sequence that it computes from its tokens."""
        self.grants.close(grant)
        sequence = grant.sequence
        sequence.recomputed = sequence.num_output_tokens > 0
        return Admit(sequence, grant.router_id, grant.deadline, waited=now - grant.asked)

    def _open(self, grant: OpenGrant, peer: bytes, now: float) -> list[Action]:
        sequence = grant.sequence
        self.grants.open(grant)
        grant.blocks = sequence.block_table[sequence.num_computed // self._pool.block_size :]
        grant.expires = min(grant.deadline, now + self._grant_timeout)
        told = Reply(peer, grant.message(self._epoch, now))
        return [OpenReceive(grant.grant_id, grant.blocks, peer), told]

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
        assert grant.peer is not None, "nobody else hands off"
        answer = self._acceptances.accept(grant.peer, handoff)
        admit = Admit(sequence, grant.router_id, grant.deadline)
        return [*self._close(grant), admit, Reply(grant.peer, answer)]

    def _close(self, grant: OpenGrant) -> list[Action]:
        return [CloseReceive(grant.grant_id)] if self.grants.close(grant) else []

    def _fail(self, grant: OpenGrant, error: KvferryError) -> list[Action]:
        return [*self._close(grant), _failed(grant.request_id, grant.router_id, error)]

    def _count_failure(self, reason: str) -> None:
        self.integrity_failures[reason] = self.integrity_failures.get(reason, 0) + 1


def _failed(request_id: str, router_id: str, error: KvferryError) -> Report:
    failed = RequestFailed(request_id=request_id, code=error.code, message=str(error))
    return Report(router_id, failed)


Transition = Callable[[Admission, Any, Any, float], list[Action]]
Kind = type[Event | GrantRequest | Handoff | Revoke]  # a peer's event goes by its message

_OF_A_REQUEST: Mapping[Kind, Transition] = {
    Asked: Admission._asked,  # refused: there is a grant
    Revoke: Admission._end,
    Cancelled: Admission._cancelled,
    RouterLost: Admission._end,
    Tick: Admission._expired,
}

# By the state of the event's grant; None: there is none, or it is another peer's. What is not
# here cannot happen: only requests with a grant hear of routers and time, and only the transfer
# speaks of a grant by its number, once it is open.
TRANSITIONS: Mapping[GrantState | None, Mapping[Kind, Transition]] = {
    None: {
        GrantRequest: Admission._requested,
        Handoff: Admission._offered_again,
        Revoke: Admission._revoked_in_vain,
        Asked: Admission._asked,
        Cancelled: Admission._cancelled,
        Received: Admission._ignore,
        ReceiveFailed: Admission._ignore,
        Closed: Admission._ignore,
    },
    GrantState.PENDING: {
        **_OF_A_REQUEST,
        GrantRequest: Admission._ignore,  # the answer comes when there is room
        Handoff: Admission._offered_again,
    },
    GrantState.OPEN: {
        **_OF_A_REQUEST,
        GrantRequest: Admission._requested_again,
        Handoff: Admission._offered,
        Received: Admission._received,
        ReceiveFailed: Admission._receive_failed,
    },
    GrantState.CLOSING: {
        Received: Admission._ignore,
        ReceiveFailed: Admission._ignore,
        Closed: Admission._closed,
    },
}
