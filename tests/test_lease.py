"""Prefill's leases: every event in every state, one by one and in random order beside a model."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill.handoff import TRANSITIONS, Handoffs
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
    RouterLost,
    Ship,
    ShipFailed,
    Shipped,
    Tell,
    Tick,
)
from prefill.lease import LeaseState
from protocol.messages import Accepted, Grant, GrantRefused, PeerAddress
from protocol.sampling import SamplingParams
from tests.handoff_simulation import DECODE, EPOCH, FINGERPRINT

GONE = None
QUEUED, ASKED, AHEAD, SHIPPING, DRAINING, OFFERED = LeaseState
STATES = (GONE, QUEUED, ASKED, AHEAD, SHIPPING, DRAINING, OFFERED)
REJECTED = "rejected"
STOP = 999
TIMEOUT = 100.0  # seconds
BLOCK, NUM_BLOCKS = 4, 3

# What follows on each state, in the order of STATES.
NEXT: dict[str, tuple[LeaseState | str | None, ...]] = {
    "queue": (QUEUED, *[REJECTED] * 6),
    "ask": (REJECTED, ASKED, ASKED, *[REJECTED] * 4),
    "compute": (REJECTED, QUEUED, ASKED, REJECTED, SHIPPING, REJECTED, REJECTED),
    "first token": (REJECTED, REJECTED, AHEAD, REJECTED, DRAINING, REJECTED, REJECTED),
    "only token": (REJECTED, GONE, GONE, REJECTED, GONE, REJECTED, REJECTED),
    "grant": (GONE, QUEUED, SHIPPING, DRAINING, SHIPPING, DRAINING, OFFERED),
    "misfit": (GONE, QUEUED, GONE, GONE, SHIPPING, DRAINING, OFFERED),
    "foreign grant": STATES,
    "refuse": (GONE, QUEUED, GONE, GONE, SHIPPING, DRAINING, OFFERED),
    "accept": (GONE, QUEUED, ASKED, AHEAD, SHIPPING, DRAINING, GONE),
    "accept another": STATES,
    # Or OFFERED, with the last.
    "ship": (GONE, REJECTED, REJECTED, REJECTED, SHIPPING, DRAINING, REJECTED),
    "ship fails": (GONE, REJECTED, REJECTED, REJECTED, GONE, GONE, REJECTED),
    "cancel": (GONE,) * 7,
    "lose router": (GONE,) * 7,
    "wait": STATES,
    "time out": (GONE,) * 7,
}
STALE = {("accept", state) for state in STATES if state is not OFFERED}
STALE |= {("accept another", state) for state in STATES}
STALE |= {("foreign grant", state) for state in STATES}
STALE |= {("grant", GONE), ("misfit", GONE), ("refuse", GONE)}


class Scene:
    """One request at a time on a prefill worker, with the test as scheduler and transport."""

    def __init__(self) -> None:
        self.pool = BlockPool(16, BLOCK)
        self.handoffs = Handoffs(self.pool, FINGERPRINT)
        self.now = 0.0
        self.number = 0  # of the request
        self.under_way: list[Ship] = []
        self.unfinished: dict[str, Sequence] = {}  # by request; their blocks are the scheduler's
        self.sequence = self._new_sequence()

    @property
    def state(self) -> LeaseState | None:
        lease = self.handoffs.lease(self.sequence.request_id)
        return lease.state if lease else None

    @property
    def grant_id(self) -> int:
        """Of the request's grant, if it gets one."""
        return self.number + 100

    def happen(self, name: str) -> list[Action]:
        """Let it happen, and do what follows."""
        actions = self.handoffs.handle(self._event(name), self.now)
        for action in actions:
            if isinstance(action, Ship):
                self.under_way.append(action)
            elif isinstance(action, Abandon) and action.request_id in self.unfinished:
                self.pool.release_sequence(self.unfinished.pop(action.request_id))
        self.check()
        return actions

    def check(self) -> None:
        """Each block reference has one owner."""
        scheduled = [sequence.block_table for sequence in self.unfinished.values()]
        self.pool.check_integrity([*scheduled, *self.handoffs.owned_blocks()])
        leased = self.state is not None
        assert self.handoffs.num_open == leased + len(self.under_way)

    def _event(self, name: str) -> Event:
        sequence, request_id = self.sequence, self.sequence.request_id
        grant_id = self.grant_id
        grant = Grant(
            request_id=request_id,
            grant_id=grant_id,
            epoch=EPOCH,
            num_cached_tokens=0,
            blocks=list(range(NUM_BLOCKS)),
            expires_in=TIMEOUT,
        )
        match name:
            case "queue":
                if self.state is None:
                    sequence = self._new_sequence()
                    assert self.pool.reserve(sequence, 0)
                    self.unfinished[sequence.request_id] = sequence
                peer = PeerAddress(worker_id=DECODE, epoch=EPOCH, control="", data=b"")
                return Queued(sequence, "router", peer, self.now + TIMEOUT)
            case "ask":
                return Ask(request_id)
            case "compute":
                if self.state is not GONE:
                    most = sequence.num_given_tokens - 1
                    sequence.num_computed = min(sequence.num_computed + BLOCK, most)
                return Computed(request_id, finished=False)
            case "first token" | "only token":
                if request_id in self.unfinished:
                    sequence.num_computed = sequence.num_tokens
                    sequence.token_ids.append(STOP if name == "only token" else 1)
                    del self.unfinished[request_id]
                return Computed(request_id, finished=True)
            case "grant":
                return FromPeer(DECODE, grant)
            case "foreign grant":
                return FromPeer("stranger", grant)
            case "misfit":
                return FromPeer(DECODE, grant.model_copy(update={"blocks": [0]}))
            case "refuse":
                refusal = GrantRefused(request_id=request_id, code="overloaded", message="full")
                return FromPeer(DECODE, refusal)
            case "accept" | "accept another":
                accepted = grant_id if name == "accept" else grant_id + 1
                return FromPeer(DECODE, Accepted(request_id=request_id, grant_id=accepted))
            case "ship":
                ship = self.under_way.pop(0)
                return Shipped(ship.grant_id, ship.first, [7] * len(ship.source))
            case "ship fails":
                ship = self.under_way.pop(0)
                return ShipFailed(ship.grant_id, ship.first, "broken")
            case "cancel":
                return Cancelled(request_id)
            case "lose router":
                return RouterLost("router")
            case "wait":
                return Tick()
            case _:
                assert name == "time out"
                self.now += TIMEOUT
                return Tick()

    def _new_sequence(self) -> Sequence:
        self.number += 1
        sampling = SamplingParams(max_tokens=6, stop_token_ids=(STOP,))
        self.sequence = Sequence(f"r#{self.number}", list(range(9)), 9, sampling)
        return self.sequence


WAYS: dict[LeaseState | None, list[str]] = {
    GONE: ["queue", "ask", "compute", "grant", "cancel"],  # with a batch of blocks under way
    QUEUED: ["queue"],
    ASKED: ["queue", "ask"],
    AHEAD: ["queue", "ask", "compute", "first token"],
    SHIPPING: ["queue", "ask", "compute", "grant", "compute"],
    DRAINING: ["queue", "ask", "compute", "grant", "first token"],
    OFFERED: ["queue", "ask", "grant", "first token", "ship"],
}


def possible(scene: Scene, name: str) -> bool:
    """Whether the scheduler and the transport can let it happen."""
    if name.startswith("ship"):
        return bool(scene.under_way)
    return name != "first token" or scene.state is not QUEUED  # not before the grant is asked


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", NEXT)
def test_every_event_in_every_state_is_in_the_table_or_rejected(
    name: str, state: LeaseState | None
) -> None:
    scene = Scene()
    for step in WAYS[state]:
        scene.happen(step)
    assert scene.state is state
    if possible(scene, name):
        advance_beside_model(scene, name)


KINDS: dict[type, list[str]] = {
    Queued: ["queue"],
    Ask: ["ask"],
    Computed: ["compute", "first token", "only token"],
    Grant: ["grant", "misfit", "foreign grant"],
    GrantRefused: ["refuse"],
    Accepted: ["accept", "accept another"],
    Shipped: ["ship"],
    ShipFailed: ["ship fails"],
    Cancelled: ["cancel"],
    RouterLost: ["lose router"],
    Tick: ["wait", "time out"],
}


def test_the_table_names_what_can_happen_and_nothing_else() -> None:
    assert KINDS.keys() == {*get_args(Event), *get_args(Answer)} - {FromPeer}
    assert TRANSITIONS.keys() == {None, *LeaseState}
    to_all = (RouterLost, Tick)  # those that have a lease
    for column, state in enumerate(STATES):
        expected = {kind for kind, names in KINDS.items() if NEXT[names[0]][column] != REJECTED}
        assert TRANSITIONS[state].keys() == expected - ({*to_all} if state is None else set())


def advance_beside_model(scene: Scene, name: str) -> None:
    """Let it happen, and compare with what must follow."""
    before, handoffs = scene.state, scene.handoffs
    counted = handoffs.num_stale, handoffs.num_expired
    follows = NEXT[name][STATES.index(before)]
    if name.startswith("ship") and scene.under_way[0].grant_id != scene.grant_id:
        follows = before  # blocks of a former lease
    if follows == REJECTED:
        where = f"while {before.name}" if before else "without a lease"
        with pytest.raises(ValueError, match=where):
            scene.happen(name)
        assert scene.state is before
        return
    kinds = [type(action) for action in scene.happen(name)]
    if name == "ship" and follows is DRAINING:
        more = any(ship.grant_id == scene.grant_id for ship in scene.under_way)
        follows = DRAINING if more else OFFERED
    assert scene.state is follows
    stale, expired = (name, before) in STALE, name == "time out" and before is not GONE
    assert (handoffs.num_stale, handoffs.num_expired) == (counted[0] + stale, counted[1] + expired)
    ended = follows is GONE and before is not GONE
    assert (Abandon in kinds) == (ended and name not in ("accept", "only token"))
    assert (Allow in kinds) == (name == "grant" and before in (ASKED, AHEAD))


names: st.SearchStrategy[str] = st.sampled_from(
    [*NEXT, "queue", "ask", "compute", "grant", "ship", "first token", "accept"]
)


@settings(max_examples=400, deadline=None)
@given(events=st.lists(names, max_size=40))
def test_leases_go_as_the_model_does_in_any_order_of_events(events: list[str]) -> None:
    scene = Scene()
    for name in events:
        if possible(scene, name):
            advance_beside_model(scene, name)
    scene.happen("time out")
    while scene.under_way:
        scene.happen("ship")
    assert scene.handoffs.num_open == scene.pool.num_used == 0


def test_a_grant_asked_for_again_after_the_first_token_is_for_the_same_tokens() -> None:
    scene = Scene()
    scene.happen("queue")
    (first,) = scene.happen("ask")
    scene.happen("first token")
    assert scene.state is AHEAD
    scene.now += 1.0
    (again,) = scene.happen("wait")
    assert isinstance(first, Tell)
    assert isinstance(again, Tell)
    assert again.message == first.message.model_copy(update={"timeout": TIMEOUT - 1.0})
