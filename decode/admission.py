"""How requests come into decode: a pure state machine, one grant per request.

    PENDING ──room──> OPEN ──all blocks and the Handoff, verified──> gone (admitted)
       │                │
       │                └──Revoked, Cancelled, ReceiveFailed, expiry──> CLOSING ──Closed──> gone
       └──room, and decode computes the prompt itself──> gone (admitted)

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
``TRANSITIONS`` names what every event does in every state.
Blocks are reserved before prefill computes. They are written only while the grant is OPEN, and
given back only once the transport has confirmed (Closed) that no receive into them is left: a
timeout alone frees nothing. Those that a tier holds do not travel: it fills them meanwhile. What
prefill has heard no answer to it repeats, and gets the same answer. Blocks that do not verify, or
never come, are not read: the sequence is computed anew from its token ids. What several prompts
have in common comes once (``decode.sharing``).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, assert_never

from decode import admission_events as adm
from decode.acceptances import Acceptances
from decode.admission_events import Actions, Event, FromPeer
from decode.grant import Grants, GrantState, OpenGrant, without_blocks
from decode.room import Room
from decode.sharing import part, share
from decode.terms import Terms
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.errors import KvferryError, WorkerLostError
from protocol.geometry import Fingerprint
from protocol.messages import Continuation, GrantRequest, Handoff, Revoke

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
        self._terms = Terms(pool, fingerprint, epoch, vocab_size)
        self._grant_timeout = grant_timeout
        self.room = Room(pool, headroom)
        self.grants = Grants(new_grant_id, max_pending)
        self._acceptances = Acceptances(max_pending)
        self.num_expired = 0
        self.num_stale = 0  # hand-offs without a grant, requests to a former incarnation
        self.integrity_failures: Counter[str] = Counter()  # by reason

    def handle(self, event: Event, now: float) -> Actions:
        """Advance by one event.

        Raises ValueError for one that cannot be in the state of its grant.
        """
        match event:
            case FromPeer():
                grant = self.grants.of_request(event.message.request_id)
                given = grant is not None and grant.peer == event.peer
                return self._advance(grant if given else None, event, now)
            case adm.Asked() | adm.Cancelled():
                return self._advance(self.grants.of_request(event.request_id), event, now)
            case adm.Received() | adm.Loaded() | adm.ReceiveFailed() | adm.Closed():
                return self._advance(self.grants.numbered(event.grant_id), event, now)
            case adm.RouterLost():
                return self._advance_all(self.grants.of_router(event.router_id), event, now)
            case adm.Tick():
                ended = self._advance_all(self.grants.of_requests(), event, now)
                return [*ended, *self._grant_pending(now)]
            case _:
                assert_never(event)

    def _advance_all(
        self, grants: Iterable[OpenGrant], event: adm.Tick | adm.RouterLost, now: float
    ) -> Actions:
        in_turn = sorted(grants, key=lambda grant: grant.leader is None)  # as ``part`` asks
        return [action for grant in in_turn for action in self._advance(grant, event, now)]

    def _advance(self, grant: OpenGrant | None, event: Event, now: float) -> Actions:
        state = grant.state if grant is not None else None
        kind = type(event.message) if isinstance(event, FromPeer) else type(event)
        transition = TRANSITIONS[state].get(kind)
        if transition is None:
            where = f"while {state.name}" if state else "without a grant"
            raise ValueError(f"{kind.__name__} {where}")
        return transition(self, grant, event, now)

    # Transitions -----------------------------------------------------------------------------

    def _requested(self, _: None, event: FromPeer[GrantRequest], now: float) -> Actions:
        peer, request = event.peer, event.message
        self.num_stale += request.epoch != self._terms.epoch
        if request.fingerprint != self._terms.fingerprint:
            self.integrity_failures["fingerprint"] += 1
        error = self.grants.refusal(request.request_id) or self._terms.objection(request)
        if error is not None:
            return [adm.refused(peer, request.request_id, error)]
        return self._queue(request, request.router_id, peer, now)

    def _requested_again(
        self, grant: OpenGrant, event: FromPeer[GrantRequest], now: float
    ) -> Actions:
        return [adm.Reply(event.peer, grant.message(self._terms.epoch, now))]

    def _asked(self, _: OpenGrant | None, event: adm.Asked, now: float) -> Actions:
        request = event.request
        error = self.grants.refusal(request.request_id) or self._terms.misfit(request)
        if error is not None:
            return [adm.failed(event.router_id, request.request_id, error)]
        return self._queue(request, event.router_id, None, now)

    def _received(self, grant: OpenGrant, event: adm.Received, now: float) -> Actions:
        grant.digests.update(enumerate(event.digests, start=event.first))
        return self._arrived(grant, now)

    def _loaded(self, grant: OpenGrant, event: adm.Loaded, now: float) -> Actions:
        grant.num_loaded = event.num_blocks
        return self._arrived(grant, now)

    def _receive_failed(self, grant: OpenGrant, event: adm.ReceiveFailed, now: float) -> Actions:
        return self._fail(grant, WorkerLostError(f"KV transfer failed: {event.reason}"), now)

    def _offered(self, grant: OpenGrant, event: FromPeer[Handoff], now: float) -> Actions:
        handoff = event.message
        if self._acceptances.repeat(event.peer, handoff) is not None:
            return self._offered_again(grant, event, now)
        error = self._terms.disagreement(grant, handoff)
        if error is not None:
            self.integrity_failures["handoff"] += 1
            return self._fail(grant, error, now)
        if grant.handoff is None:  # everything was sent: what is missing must be close behind
            grant.handoff = handoff
            grant.expires = min(grant.expires, now + LATE_BLOCKS)
        return self._admit_if_complete(grant, now)

    def _offered_again(self, _: OpenGrant | None, event: FromPeer[Handoff], now: float) -> Actions:
        answer = self._acceptances.repeat(event.peer, event.message)
        self.num_stale += answer is None
        return [adm.Reply(event.peer, answer)] if answer is not None else []

    def _revoked_in_vain(self, _: None, event: FromPeer[Revoke], now: float) -> Actions:
        """Once accepted, the request is no longer prefill's to end; nor is another peer's."""
        self.num_stale += self.grants.of_request(event.message.request_id) is not None
        return []

    def _cancelled(self, grant: OpenGrant | None, event: adm.Cancelled, now: float) -> Actions:
        self.grants.cancel(event.request_id)
        closing = self._close(grant, now) if grant is not None else []
        return [*closing, adm.Abandon(event.request_id)]

    def _expired(self, grant: OpenGrant, _: adm.Tick, now: float) -> Actions:
        if now < (grant.expires if grant.leader is None else grant.deadline):
            return []
        if grant.handoff is not None and now < grant.deadline:
            self.integrity_failures["missing"] += 1
            return self._admit(grant, grant.handoff, without_blocks(grant.sequence), now)
        self.num_expired += 1
        return self._fail(grant, grant.expiry(now), now)

    def _end(self, grant: OpenGrant, _: FromPeer[Revoke] | adm.RouterLost, now: float) -> Actions:
        return self._close(grant, now)

    def _closed(self, grant: OpenGrant, _: adm.Closed, now: float) -> Actions:
        self.grants.forget(grant)
        self._pool.release_sequence(grant.sequence)
        return self._grant_pending(now)

    def _ignore(self, _grant: OpenGrant | None, _: Event, now: float) -> Actions:
        return []

    # What they share -------------------------------------------------------------------------

    def _queue(
        self, request: Continuation, router_id: str, peer: bytes | None, now: float
    ) -> Actions:
        sequence, deadline = Sequence.of(request), now + request.timeout
        self.grants.add(OpenGrant(peer, router_id, sequence, now, deadline, expires=deadline))
        return self._grant_pending(now)

    def _grant_pending(self, now: float) -> Actions:
        actions: Actions = []
        for grant in self.room.let_in(self.grants.pending()):
            if grant.peer is None:
                actions.append(self._admit_prompt(grant, now))
            else:
                actions += self._open(grant, grant.peer, now)
        return actions

    def _admit_prompt(self, grant: OpenGrant, now: float) -> adm.Admit:
        """Let decode have a sequence that it computes from its tokens."""
        self.grants.close(grant)
        sequence = grant.sequence
        sequence.recomputed = sequence.num_output_tokens > 0
        return adm.Admit(sequence, grant.router_id, grant.deadline, waited=now - grant.asked)

    def _open(self, grant: OpenGrant, peer: bytes, now: float) -> Actions:
        share(grant, self.grants.of_requests(), self._pool)
        self.grants.open(grant)
        grant.expires = min(grant.deadline, now + self._grant_timeout)
        load = adm.LoadBlocks(grant.grant_id, grant.sequence, grant.num_to_load)
        told = adm.Reply(peer, grant.message(self._terms.epoch, now))
        receive = adm.OpenReceive(grant.grant_id, grant.blocks, peer)
        return [load, receive, told] if load.count else [receive, told]

    def _arrived(self, grant: OpenGrant, now: float) -> Actions:
        """Some of the blocks are in place: the others may take as long again."""
        patience = LATE_BLOCKS if grant.handoff else self._grant_timeout
        grant.expires = min(grant.deadline, now + patience)
        return self._admit_if_complete(grant, now)

    def _admit_if_complete(self, grant: OpenGrant, now: float) -> Actions:
        handoff = grant.handoff
        if handoff is None or not grant.complete:
            return []
        damaged = any(grant.digests[i] != digest for i, digest in enumerate(handoff.digests))
        if damaged:
            self.integrity_failures["digest"] += 1
        if damaged or not grant.held_whole:
            return self._admit(grant, handoff, without_blocks(grant.sequence), now)
        sequence = grant.sequence
        sequence.num_computed = sequence.num_tokens
        self._pool.publish(sequence, 0)
        grant.sequence = without_blocks(sequence)  # the blocks now belong to the sequence
        grant.whole = True
        return self._admit(grant, handoff, sequence, now)

    def _admit(self, grant: OpenGrant, handoff: Handoff, sequence: Sequence, now: float) -> Actions:
        """Let decode have the sequence, which it computes if the blocks stay with the grant."""
        sequence.token_ids.append(handoff.first_token)
        assert grant.peer is not None, "nobody else hands off"
        answer = self._acceptances.accept(grant.peer, handoff)
        admit = adm.Admit(sequence, grant.router_id, grant.deadline)
        return [*self._close(grant, now), admit, adm.Reply(grant.peer, answer)]

    def _close(self, grant: OpenGrant, now: float) -> Actions:
        """Its followers' own time begins: until now they waited for this one's blocks."""
        if not self.grants.close(grant):
            return []
        freed = [action for each in part(grant) for action in self._arrived(each, now)]
        return [adm.CloseReceive(grant.grant_id), *freed]

    def _fail(self, grant: OpenGrant, error: KvferryError, now: float) -> Actions:
        return [*self._close(grant, now), adm.failed(grant.router_id, grant.request_id, error)]


Transition = Callable[[Admission, Any, Any, float], Actions]
Kind = type[Event | GrantRequest | Handoff | Revoke]  # a peer's event goes by its message

_OF_A_REQUEST: Mapping[Kind, Transition] = {
    adm.Asked: Admission._asked,  # refused: there is a grant
    Revoke: Admission._end,
    adm.Cancelled: Admission._cancelled,
    adm.RouterLost: Admission._end,
    adm.Tick: Admission._expired,
}

# By the state of the event's grant; None: there is none, or it is another peer's. What is not
# here cannot happen: only requests with a grant hear of routers and time, and only the transfer
# speaks of a grant by its number, once it is open.
TRANSITIONS: Mapping[GrantState | None, Mapping[Kind, Transition]] = {
    None: {
        GrantRequest: Admission._requested,
        Handoff: Admission._offered_again,
        Revoke: Admission._revoked_in_vain,
        adm.Asked: Admission._asked,
        adm.Cancelled: Admission._cancelled,
        adm.Received: Admission._ignore,
        adm.Loaded: Admission._ignore,
        adm.ReceiveFailed: Admission._ignore,
        adm.Closed: Admission._ignore,
    },
    GrantState.PENDING: {
        **_OF_A_REQUEST,
        GrantRequest: Admission._ignore,  # the answer comes when there is room
        Handoff: Admission._offered_again,
    },
    GrantState.OPEN: {
        **_OF_A_REQUEST,
        GrantRequest: Admission._requested_again,  # it has not heard the answer
        Handoff: Admission._offered,
        adm.Received: Admission._received,
        adm.Loaded: Admission._loaded,
        adm.ReceiveFailed: Admission._receive_failed,
    },
    GrantState.CLOSING: {
        adm.Received: Admission._ignore,
        adm.Loaded: Admission._ignore,
        adm.ReceiveFailed: Admission._ignore,
        adm.Closed: Admission._closed,
    },
}
