"""Hand-offs from prefill's side: a pure state machine, one lease per request.

    QUEUED ──Ask──> ASKED ──Granted──> SHIPPING ──Computed (first token)──> DRAINING
                      │                                                     ^  │ last Shipped
                      └──Computed (first token)──> AHEAD ──Granted──────────┘  v
                                                       gone <──Accepted── OFFERED
       any state ──Cancelled, Refused, ShipFailed, deadline──> gone

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
``TRANSITIONS`` names what every event does in every state.
What decode leaves unanswered (ASKED, AHEAD, OFFERED) is said again: a link may lose a message
when its connection breaks, and decode answers a repetition as it answered before.
While a prompt computes the scheduler owns its blocks; from the first token on the lease does. What
the transport may be reading has references of its own (``prefill.shipments``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, assert_never

from engine.block_pool import BlockPool
from prefill.handoff_events import (
    Abandon,
    Action,
    Allow,
    Answer,
    Ask,
    Cancelled,
    Computed,
    Event,
    FromPeer,
    Queued,
    Report,
    RouterLost,
    Ship,
    ShipFailed,
    Shipped,
    Tell,
    Tick,
)
from prefill.lease import Lease, LeaseState
from prefill.shipments import Shipments
from prefill.terms import misfit, objection
from protocol.errors import DeadlineError, ProtocolError, WorkerLostError
from protocol.geometry import Fingerprint
from protocol.messages import Accepted, Grant, GrantRefused, RequestFailed, Revoke


class Handoffs:
    """All hand-offs of one prefill worker."""

    def __init__(self, pool: BlockPool, fingerprint: Fingerprint) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._leases: dict[str, Lease] = {}
        self._shipments = Shipments(pool)
        self.num_expired = 0
        self.num_stale = 0  # answers of decode workers about leases that are over

    @property
    def num_open(self) -> int:
        """Leases and transfers that are not over."""
        return len(self._leases) + len(self._shipments)

    def lease(self, request_id: str) -> Lease | None:
        """The request's hand-off, if it is not over."""
        return self._leases.get(request_id)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists owned here, for ``BlockPool.check_integrity``."""
        leased = (x.sequence.block_table for x in self._leases.values() if x.owns_blocks)
        return [*leased, *self._shipments.blocks()]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event.

        Raises ValueError for one that cannot be in the state of its lease.
        """
        match event:
            case Tick():
                return self._advance_all(self._leases.values(), event, now)
            case RouterLost():
                lost = (x for x in self._leases.values() if x.router_id == event.router_id)
                return self._advance_all(lost, event, now)
            case FromPeer():
                answer = event.message
                lease = self._leases.get(answer.request_id)
                asked = lease is not None and lease.decode.worker_id == event.worker_id
                return self._advance(lease if asked else None, answer, now)
            case Shipped() | ShipFailed():
                self._shipments.end(event.grant_id, event.first)
                return self._advance(self._under_grant(event.grant_id), event, now)
            case Queued() | Ask() | Computed() | Cancelled():
                return self._advance(self._leases.get(event.request_id), event, now)
            case _:
                assert_never(event)

    def _under_grant(self, grant_id: int) -> Lease | None:
        leases = self._leases.values()
        return next((x for x in leases if x.grant and x.grant.grant_id == grant_id), None)

    def _advance_all(
        self, leases: Iterable[Lease], event: Tick | RouterLost, now: float
    ) -> list[Action]:
        return [action for lease in [*leases] for action in self._advance(lease, event, now)]

    def _advance(self, lease: Lease | None, event: Event | Answer, now: float) -> list[Action]:
        state = lease.state if lease is not None else None
        transition = TRANSITIONS[state].get(type(event))
        if transition is None:
            where = f"while {state.name}" if state else "without a lease"
            raise ValueError(f"{type(event).__name__} {where}")
        return transition(self, lease, event, now)

    # Transitions -----------------------------------------------------------------------------

    def _queue(self, _: None, event: Queued, now: float) -> list[Action]:
        lease = Lease(event.sequence, event.router_id, event.decode, event.deadline)
        self._leases[lease.request_id] = lease
        error = misfit(event.sequence, self._pool)
        if error is not None:
            return self._fail(lease, error.code, str(error))
        # What has one token to go ends in prefill: nothing will be handed off.
        if event.sequence.num_output_tokens + 1 == event.sequence.sampling.max_tokens:
            return [Allow(lease.request_id)]
        return []

    def _ask(self, lease: Lease, _: Ask, now: float) -> list[Action]:
        lease.enter(LeaseState.ASKED, now)
        return [self._question(lease, now)]

    def _granted(self, lease: Lease, grant: Grant, now: float) -> list[Action]:
        num_tokens = lease.sequence.num_given_tokens
        wrong = objection(grant, lease.decode.epoch, num_tokens, self._pool.block_size)
        # Decode workers number their grants at random, each on its own.
        if grant.grant_id in self._grant_ids_in_use():
            wrong = f"grant id {grant.grant_id} is in use by another request"
        if wrong is not None:
            return self._fail(lease, ProtocolError.code, f"the grant does not fit: {wrong}")
        lease.grant = grant
        if lease.state is LeaseState.AHEAD:
            return [Allow(lease.request_id), *self._drain(lease, now)]
        lease.state = LeaseState.SHIPPING
        return [Allow(lease.request_id), *self._ship(lease)]

    def _refused(self, lease: Lease, refusal: GrantRefused, now: float) -> list[Action]:
        return self._fail(lease, refusal.code, refusal.message)

    def _computed(self, lease: Lease, event: Computed, now: float) -> list[Action]:
        if not event.finished:
            return self._ship(lease)
        if lease.sequence.finish_reason() is not None:  # the first token is the last
            revoke = self._revoke(lease)
            lease.state = LeaseState.DRAINING
            self._end(lease)
            return revoke
        if lease.grant is None:
            lease.state = LeaseState.AHEAD
            return []
        return self._drain(lease, now)

    def _shipped(self, lease: Lease, event: Shipped, now: float) -> list[Action]:
        lease.digests.update(enumerate(event.digests, start=event.first))
        return []

    def _shipped_late(self, lease: Lease, event: Shipped, now: float) -> list[Action]:
        return [*self._shipped(lease, event, now), *self._offer(lease, now)]

    def _ship_failed(self, lease: Lease, event: ShipFailed, now: float) -> list[Action]:
        message = f"KV transfer to {lease.decode.worker_id} failed: {event.reason}"
        return self._fail(lease, WorkerLostError.code, message)

    def _accepted(self, lease: Lease, message: Accepted, now: float) -> list[Action]:
        if lease.grant is None or lease.grant.grant_id != message.grant_id:
            return self._stale(lease, message, now)
        self._end(lease)
        return []

    def _expire(self, lease: Lease, _: Tick, now: float) -> list[Action]:
        if now < lease.deadline:
            return []
        self.num_expired += 1
        message = f"the request's deadline passed in prefill ({lease.state.name.lower()})"
        return self._fail(lease, DeadlineError.code, message)

    def _expire_or_repeat(self, lease: Lease, tick: Tick, now: float) -> list[Action]:
        if now < lease.deadline and lease.must_repeat(now):
            return [self._question(lease, now)]
        return self._expire(lease, tick, now)

    def _cancel(self, lease: Lease, _: Cancelled | RouterLost, now: float) -> list[Action]:
        return self._drop(lease)

    def _stale(self, lease: Lease | None, _: Answer, now: float) -> list[Action]:
        self.num_stale += 1
        return []

    def _ignore(self, lease: Lease | None, _: Event | Answer, now: float) -> list[Action]:
        return []

    # What they share -------------------------------------------------------------------------

    def _ship(self, lease: Lease) -> list[Action]:
        """Send what can be sent now."""
        first, source, destination = lease.take_unshipped(self._pool.block_size)
        if lease.grant is None or not source:
            return []
        self._shipments.begin(lease.grant.grant_id, first, source)
        return [Ship(lease.decode, lease.grant.grant_id, first, source, destination)]

    def _drain(self, lease: Lease, now: float) -> list[Action]:
        """All is computed, and decode has room for it: send the rest."""
        lease.state = LeaseState.DRAINING
        return [*self._ship(lease), *self._offer(lease, now)]

    def _offer(self, lease: Lease, now: float) -> list[Action]:
        """Hand off once every block is sent and its digest known."""
        grant = lease.grant
        if grant is None or len(lease.digests) < len(grant.blocks):
            return []
        lease.enter(LeaseState.OFFERED, now)
        return [self._question(lease, now)]

    def _question(self, lease: Lease, now: float) -> Tell:
        return Tell(lease.decode, lease.question(self._fingerprint, now))

    def _grant_ids_in_use(self) -> set[int]:
        leased = {lease.grant.grant_id for lease in self._leases.values() if lease.grant}
        return leased | self._shipments.grant_ids()

    def _fail(self, lease: Lease, code: str, message: str) -> list[Action]:
        failed = RequestFailed(request_id=lease.request_id, code=code, message=message)
        return [*self._drop(lease), Report(lease.router_id, failed)]

    def _drop(self, lease: Lease) -> list[Action]:
        revoke = self._revoke(lease)
        self._end(lease)
        return [Abandon(lease.request_id), *revoke]

    def _revoke(self, lease: Lease) -> list[Action]:
        if lease.state is LeaseState.QUEUED:
            return []
        return [Tell(lease.decode, Revoke(request_id=lease.request_id))]

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.request_id]
        if lease.owns_blocks:
            self._pool.release_sequence(lease.sequence)


Transition = Callable[[Handoffs, Any, Any, float], list[Action]]

_WITH_A_LEASE: Mapping[type[Event | Answer], Transition] = {
    Cancelled: Handoffs._cancel,
    RouterLost: Handoffs._cancel,
    Tick: Handoffs._expire,
    # What decode says is judged by itself: it may come late or twice, and from anybody.
    Grant: Handoffs._ignore,
    GrantRefused: Handoffs._ignore,
    Accepted: Handoffs._stale,
}

# By the state of the event's lease; None: it has none, or decode's answer is to another worker's.
# What is not here cannot happen: the scheduler, the transfer and the worker know better.
TRANSITIONS: Mapping[LeaseState | None, Mapping[type[Event | Answer], Transition]] = {
    None: {
        Queued: Handoffs._queue,
        Cancelled: Handoffs._ignore,
        Shipped: Handoffs._ignore,
        ShipFailed: Handoffs._ignore,
        Grant: Handoffs._stale,
        GrantRefused: Handoffs._stale,
        Accepted: Handoffs._stale,
    },
    LeaseState.QUEUED: {
        **_WITH_A_LEASE,
        Ask: Handoffs._ask,
        Computed: Handoffs._computed,
    },
    LeaseState.ASKED: {
        **_WITH_A_LEASE,
        Ask: Handoffs._ignore,
        Computed: Handoffs._computed,
        Grant: Handoffs._granted,
        GrantRefused: Handoffs._refused,
        Tick: Handoffs._expire_or_repeat,
    },
    LeaseState.AHEAD: {
        **_WITH_A_LEASE,
        Grant: Handoffs._granted,
        GrantRefused: Handoffs._refused,
        Tick: Handoffs._expire_or_repeat,
    },
    LeaseState.SHIPPING: {
        **_WITH_A_LEASE,
        Computed: Handoffs._computed,
        Shipped: Handoffs._shipped,
        ShipFailed: Handoffs._ship_failed,
    },
    LeaseState.DRAINING: {
        **_WITH_A_LEASE,
        Shipped: Handoffs._shipped_late,
        ShipFailed: Handoffs._ship_failed,
    },
    LeaseState.OFFERED: {
        **_WITH_A_LEASE,
        Accepted: Handoffs._accepted,
        Tick: Handoffs._expire_or_repeat,
    },
}
