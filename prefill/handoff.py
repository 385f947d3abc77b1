"""Hand-offs from prefill's side: a pure state machine, one lease per request.

    QUEUED ──Ask──> ASKED ──Granted──> SHIPPING ──Computed (first token)──> DRAINING
                                                                               │ last Shipped
       any state ──Cancelled, Refused, ShipFailed, deadline──> gone            v
                                                       gone <──Accepted── OFFERED

An event goes in, actions come out; the clock is passed in, nothing is sent or awaited here.
What decode leaves unanswered (ASKED, OFFERED) is said again: a link may lose a message when its
connection breaks, and decode answers a repetition as it answered before.
While a prompt computes the scheduler owns its blocks; from the first token on the lease does.
Every batch of blocks under way holds references of its own, so a block is never reused while
the transport may still read it, whatever becomes of the request.
"""

from __future__ import annotations

from typing import assert_never

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill.handoff_events import (
    Abandon,
    Action,
    Allow,
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
from prefill.lease import Lease, LeaseState, UnderWay
from prefill.terms import objection
from protocol.errors import (
    ContextLengthError,
    DeadlineError,
    InvalidRequestError,
    ProtocolError,
    WorkerLostError,
)
from protocol.geometry import Fingerprint
from protocol.messages import (
    Accepted,
    Grant,
    GrantRefused,
    RequestFailed,
    Revoke,
)

MAX_LOGPROBS = 4_000_000  # entries of up to 16 bytes on the wire, in a message of 64 MiB


class Handoffs:
    """All hand-offs of one prefill worker."""

    def __init__(self, pool: BlockPool, fingerprint: Fingerprint) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._leases: dict[str, Lease] = {}
        self._under_way: dict[tuple[int, int], UnderWay] = {}  # by grant id and first position
        self.num_expired = 0
        self.num_stale = 0  # answers of decode workers about leases that are over

    @property
    def num_open(self) -> int:
        """Leases and transfers that are not over."""
        return len(self._leases) + len(self._under_way)

    def lease(self, request_id: str) -> Lease | None:
        """The request's hand-off, if it is not over."""
        return self._leases.get(request_id)

    def owned_blocks(self) -> list[list[int]]:
        """Block lists owned here, for ``BlockPool.check_integrity``."""
        owned = (LeaseState.DRAINING, LeaseState.OFFERED)
        leased = [x.sequence.block_table for x in self._leases.values() if x.state in owned]
        return leased + [shipment.blocks for shipment in self._under_way.values()]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event."""
        match event:
            case Queued():
                return self._queue(event)
            case Tick():
                return [*self._expire(now), *self._repeat(now)]
            case FromPeer():
                return self._heard(event)
            case RouterLost():
                leases = [x for x in self._leases.values() if x.router_id == event.router_id]
                return [action for lease in leases for action in self._drop(lease)]
            case Shipped() | ShipFailed():
                shipment = self._under_way.pop((event.grant_id, event.first))
                self._pool.release(shipment.blocks)
                lease = self._leases.get(shipment.request_id)
            case _:
                lease = self._leases.get(event.request_id)
        return self._advance(lease, event, now) if lease is not None else []

    def _heard(self, event: FromPeer) -> list[Action]:
        message = event.message
        lease = self._leases.get(message.request_id)
        if lease is None or lease.decode.worker_id != event.worker_id:
            self.num_stale += 1
            return []
        match message:
            case Grant():
                return self._granted(lease, message)
            case GrantRefused():
                return self._refused(lease, message)
            case Accepted():
                return self._accepted(lease, message)
            case _:
                assert_never(message)

    def _advance(
        self,
        lease: Lease,
        event: Ask | Computed | Shipped | ShipFailed | Cancelled,
        now: float,
    ) -> list[Action]:
        match event:
            case Ask():
                return self._ask(lease, now)
            case Computed():
                return self._computed(lease, event, now)
            case Shipped():
                return self._shipped(lease, event, now)
            case ShipFailed():
                message = f"KV transfer to {lease.decode.worker_id} failed: {event.reason}"
                return self._fail(lease, WorkerLostError.code, message)
            case Cancelled():
                return self._drop(lease)
            case _:
                assert_never(event)

    def _queue(self, event: Queued) -> list[Action]:
        lease = Lease(event.sequence, event.router_id, event.decode, event.deadline)
        assert lease.request_id not in self._leases, f"{lease.request_id} has a lease already"
        self._leases[lease.request_id] = lease
        needed = self._pool.blocks_for(event.sequence.num_tokens)
        if needed == 0:
            return self._fail(lease, InvalidRequestError.code, "the prompt is empty")
        if event.sequence.scores_prompt and not _logprobs_fit(event.sequence):
            message = f"prompt_logprobs of {event.sequence.num_tokens} tokens do not fit a message"
            return self._fail(lease, InvalidRequestError.code, message)
        if needed > self._pool.num_blocks:
            message = f"needs {needed} KV blocks, the prefill pool has {self._pool.num_blocks}"
            return self._fail(lease, ContextLengthError.code, message)
        # What has one token to go ends in prefill: nothing will be handed off.
        if event.sequence.num_output_tokens + 1 == event.sequence.sampling.max_tokens:
            return [Allow(lease.request_id)]
        return []

    def _ask(self, lease: Lease, now: float) -> list[Action]:
        if lease.state is not LeaseState.QUEUED:
            return []
        lease.enter(LeaseState.ASKED, now)
        return [self._question(lease, now)]

    def _refused(self, lease: Lease, refusal: GrantRefused) -> list[Action]:
        if lease.state is not LeaseState.ASKED:
            return []
        lease.state = LeaseState.QUEUED  # there is nothing to revoke
        return self._fail(lease, refusal.code, refusal.message)

    def _granted(self, lease: Lease, grant: Grant) -> list[Action]:
        if lease.state is not LeaseState.ASKED:
            return []
        num_tokens = lease.sequence.num_given_tokens
        wrong = objection(grant, lease.decode.epoch, num_tokens, self._pool.block_size)
        # Decode workers number their grants at random, each on its own.
        if grant.grant_id in self._grant_ids_in_use():
            wrong = f"grant id {grant.grant_id} is in use by another request"
        lease.state, lease.grant = LeaseState.SHIPPING, grant
        if wrong is not None:
            return self._fail(lease, ProtocolError.code, f"the grant does not fit: {wrong}")
        return [Allow(lease.request_id), *self._ship(lease)]

    def _accepted(self, lease: Lease, message: Accepted) -> list[Action]:
        grant = lease.grant
        if lease.state is LeaseState.OFFERED and grant and grant.grant_id == message.grant_id:
            self._end(lease)
        else:
            self.num_stale += 1
        return []

    def _grant_ids_in_use(self) -> set[int]:
        leased = {lease.grant.grant_id for lease in self._leases.values() if lease.grant}
        return leased | {grant_id for grant_id, _ in self._under_way}

    def _computed(self, lease: Lease, event: Computed, now: float) -> list[Action]:
        if not event.finished:
            return self._ship(lease)
        if lease.sequence.finish_reason() is not None:  # the first token is the last
            revoke = self._revoke(lease)
            lease.state = LeaseState.DRAINING
            self._end(lease)
            return revoke
        lease.state = LeaseState.DRAINING
        return [*self._ship(lease), *self._offer(lease, now)]

    def _shipped(self, lease: Lease, event: Shipped, now: float) -> list[Action]:
        lease.digests.update(enumerate(event.digests, start=event.first))
        return self._offer(lease, now)

    def _ship(self, lease: Lease) -> list[Action]:
        """Send the blocks that are complete, and at the end the last, partly filled one."""
        grant, sequence = lease.grant, lease.sequence
        if grant is None:
            return []
        block_size = self._pool.block_size
        skipped = grant.num_cached_tokens // block_size
        done = lease.state is LeaseState.DRAINING
        complete = len(sequence.block_table) if done else sequence.num_computed // block_size
        first, last = lease.num_shipped, complete - skipped
        if last <= first:
            return []
        source = sequence.block_table[skipped + first : skipped + last]
        self._pool.retain(source)
        self._under_way[grant.grant_id, first] = UnderWay(lease.request_id, source)
        lease.num_shipped = last
        destination = grant.blocks[first:last]
        return [Ship(lease.decode, grant.grant_id, first, source, destination)]

    def _offer(self, lease: Lease, now: float) -> list[Action]:
        """Hand off once every block is sent and its digest known."""
        grant = lease.grant
        if lease.state is not LeaseState.DRAINING or grant is None:
            return []
        if len(lease.digests) < len(grant.blocks):
            return []
        lease.enter(LeaseState.OFFERED, now)
        return [self._question(lease, now)]

    def _question(self, lease: Lease, now: float) -> Tell:
        return Tell(lease.decode, lease.question(self._fingerprint, now))

    def _repeat(self, now: float) -> list[Action]:
        overdue = [lease for lease in self._leases.values() if lease.must_repeat(now)]
        return [self._question(lease, now) for lease in overdue]

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for lease in [x for x in self._leases.values() if now >= x.deadline]:
            self.num_expired += 1
            message = f"the request's deadline passed in prefill ({lease.state.name.lower()})"
            actions += self._fail(lease, DeadlineError.code, message)
        return actions

    def _fail(self, lease: Lease, code: str, message: str) -> list[Action]:
        failed = RequestFailed(request_id=lease.request_id, code=code, message=message)
        report = Report(lease.router_id, failed)
        return [*self._drop(lease), report]

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
        if lease.state in (LeaseState.DRAINING, LeaseState.OFFERED):
            self._pool.release_sequence(lease.sequence)


def _logprobs_fit(sequence: Sequence) -> bool:
    """Whether a message can hold its prompt's logprobs; a token counts as three entries."""
    entries = sequence.num_tokens * (3 + (sequence.sampling.prompt_logprobs or 0))
    return entries <= MAX_LOGPROBS
