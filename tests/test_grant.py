"""Decode's grants: every event in every state, one by one and in random order beside a model."""

from __future__ import annotations

from itertools import count
from typing import get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.admission import TRANSITIONS, Admission
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
    Loaded,
    Offer,
    OpenReceive,
    Received,
    ReceiveFailed,
    Reply,
    Report,
    RouterLost,
    Tick,
)
from decode.grant import GrantState
from engine.block_pool import BlockPool
from protocol.messages import GenerateRequest, Grant, GrantRequest, Handoff, Revoke
from protocol.sampling import SamplingParams
from tests.fake_model import VOCAB
from tests.handoff_simulation import EPOCH, FINGERPRINT

State = GrantState | str | None  # of a request's grant; a closing one is nobody's any more
NONE, OWN = None, "own"  # OWN: PENDING, of a prompt that decode computes itself
PENDING, OPEN, CLOSING = GrantState
STATES: tuple[State, ...] = (NONE, PENDING, OWN, OPEN)
REJECTED = "rejected"
PEER, STRANGER = b"prefill", b"stranger"
TIMEOUT, QUIET = 100.0, 30.0  # seconds: of a request, and of a grant under which nothing comes
NUM_TOKENS, NUM_BLOCKS = 9, 3

# What follows on each state, in the order of STATES. Without room for its blocks a new request
# waits, and with room time lets it in.
NEXT: dict[str, tuple[State, ...]] = {
    "request": (OPEN, PENDING, OWN, OPEN),
    "request of another epoch": (NONE, PENDING, OWN, OPEN),
    "request of a stranger": (NONE, PENDING, OWN, OPEN),  # of another epoch, too
    "ask": (NONE, PENDING, OWN, OPEN),  # the first is let in at once
    "hand off": (NONE, PENDING, OWN, OPEN),  # or NONE, when all has come
    "hand off wrongly": (NONE, PENDING, OWN, NONE),
    "revoke": (NONE, NONE, OWN, NONE),
    "revoke as a stranger": (NONE, PENDING, OWN, OPEN),
    "receive": (NONE, PENDING, OWN, OPEN),  # or NONE, when it is handed off
    "load": (NONE, PENDING, OWN, OPEN),
    "fail to receive": (NONE, PENDING, OWN, NONE),
    "close": (NONE, PENDING, OWN, REJECTED),
    "receive late": (NONE, PENDING, OWN, OPEN),  # these four: under a closing grant
    "load late": (NONE, PENDING, OWN, OPEN),
    "fail late": (NONE, PENDING, OWN, OPEN),
    "close late": (NONE, PENDING, OWN, OPEN),
    "cancel": (NONE, NONE, NONE, NONE),
    "lose router": (NONE, NONE, NONE, NONE),
    "wait": (NONE, PENDING, OWN, OPEN),
    "fall silent": (NONE, PENDING, OWN, NONE),
    "time out": (NONE, NONE, NONE, NONE),
}
TICKS = ("wait", "fall silent", "time out")
STALE: dict[str, tuple[State, ...]] = {
    "request of another epoch": (NONE, OWN),
    "request of a stranger": STATES,
    "hand off": (NONE, PENDING, OWN),
    "hand off wrongly": (NONE, PENDING, OWN),
    "revoke": (OWN,),
    "revoke as a stranger": (PENDING, OWN, OPEN),
}


class Scene:
    """One request at a time on a decode worker, with the test as scheduler and transfer."""

    def __init__(self) -> None:
        self.pool = BlockPool(300, 4)
        self.room = True
        self.admission = Admission(
            self.pool,
            FINGERPRINT,
            EPOCH,
            vocab_size=VOCAB,
            headroom=lambda: 0 if self.room else None,
            grant_timeout=QUIET,
            new_grant_id=count(1).__next__,
        )
        self.now = 0.0
        self.number = 0  # of the request
        self.deadline = 0.0
        self.closing: list[int] = []  # grant ids
        self.admitted: list[list[int]] = []  # blocks of the scheduler

    @property
    def request_id(self) -> str:
        return f"r#{self.number}"

    @property
    def state(self) -> State:
        grant = self.admission.grants.of_request(self.request_id)
        if grant is None:
            return NONE
        return OWN if grant.peer is None else grant.state

    def happen(self, name: str) -> list[Action]:
        """Let it happen, and do what follows."""
        actions = self.admission.handle(self._event(name), self.now)
        for action in actions:
            if isinstance(action, CloseReceive):
                self.closing.append(action.grant_id)
            elif isinstance(action, Admit) and action.sequence.block_table:
                self.admitted.append(action.sequence.block_table)
        self.check()
        return actions

    def check(self) -> None:
        """Each block reference has one owner, and closing grants keep theirs."""
        grants = self.admission.grants
        self.pool.check_integrity([*self.admitted, *grants.owned_blocks()])
        assert grants.num_open == len(self.closing) + (self.state is not NONE)
        assert grants.num_quarantined_blocks <= len(self.closing) * NUM_BLOCKS

    def _event(self, name: str) -> Event:
        grant = self.admission.grants.of_request(self.request_id)
        grant_id = grant.grant_id if grant else 0
        match name:
            case "request" | "ask":
                if grant is None:
                    self.number += 1
                    self.deadline = self.now + TIMEOUT
                return FromPeer(PEER, self._request()) if name == "request" else self._asked()
            case "request of another epoch":
                return FromPeer(PEER, self._request(EPOCH + 1))
            case "request of a stranger":
                return FromPeer(STRANGER, self._request(EPOCH + 1))
            case "hand off" | "hand off wrongly":
                handoff = Handoff(
                    request_id=self.request_id,
                    grant_id=grant_id,
                    epoch=EPOCH,
                    first_token=1,
                    num_tokens=NUM_TOKENS + (name == "hand off wrongly"),
                    digests=[7] * NUM_BLOCKS,
                )
                return FromPeer(PEER, handoff)
            case "revoke" | "revoke as a stranger":
                peer = PEER if name == "revoke" else STRANGER
                return FromPeer(peer, Revoke(request_id=self.request_id))
            case "receive":
                return Received(grant_id, 0, [7] * NUM_BLOCKS)
            case "load":
                return Loaded(grant_id, 0)
            case "fail to receive":
                return ReceiveFailed(grant_id, "broken")
            case "close":
                return Closed(grant_id)
            case "receive late":
                return Received(self.closing[0], 0, [7])
            case "load late":
                return Loaded(self.closing[0], 0)
            case "fail late":
                return ReceiveFailed(self.closing[0], "broken")
            case "close late":
                return Closed(self.closing.pop(0))
            case "cancel":
                return Cancelled(self.request_id)
            case "lose router":
                return RouterLost("router")
            case _:
                self.now += {"wait": 0.0, "fall silent": QUIET, "time out": TIMEOUT}[name]
                return Tick()

    def _request(self, epoch: int = EPOCH) -> GrantRequest:
        return GrantRequest(
            **dict(self._asked().request), router_id="router", epoch=epoch, fingerprint=FINGERPRINT
        )

    def _asked(self) -> Asked:
        tokens = [self.number // VOCAB % VOCAB, *[self.number % VOCAB] * (NUM_TOKENS - 1)]
        request = GenerateRequest(
            request_id=self.request_id,
            token_ids=tokens,  # not those of another request: nothing is cached
            num_prompt_tokens=NUM_TOKENS,
            sampling=SamplingParams(max_tokens=6),
            timeout=TIMEOUT,
        )
        return Asked("router", request)


class Model:
    """What must follow, beside the real thing."""

    def __init__(self) -> None:
        self.received = self.handed_off = False  # under the open grant

    def follows(self, scene: Scene, name: str, before: State, now: float) -> tuple[State, bool]:
        """The next state, and whether the sequence is let in."""
        follows = NEXT[name][STATES.index(before)]
        late = name in TICKS and now >= scene.deadline
        if before is OPEN:
            self.received |= name == "receive"
            self.handed_off |= name == "hand off"
            complete = self.received and self.handed_off and name in ("receive", "hand off")
            anew = self.handed_off and name == "fall silent" and not late
            return (NONE, True) if complete or anew else (NONE if late else follows, False)
        self.received = self.handed_off = False
        if before is NONE and name == "ask":
            return (NONE, True) if scene.room else (OWN, False)
        if before is NONE and name == "request":
            return (OPEN if scene.room else PENDING), False
        if late:
            return NONE, False
        if scene.room and follows is not NONE and name in (*TICKS, "close late"):
            return (OPEN, False) if before is PENDING else (NONE, True)
        return follows, False

    def advance(self, scene: Scene, name: str) -> None:
        """Let it happen, and compare with what must follow."""
        before, num_closing, admission = scene.state, len(scene.closing), scene.admission
        num_stale, num_expired = admission.num_stale, admission.num_expired
        if NEXT[name][STATES.index(before)] == REJECTED:
            with pytest.raises(ValueError, match="Closed while OPEN"):
                scene.happen(name)
            assert scene.state is before
            return
        kinds = [type(action) for action in scene.happen(name)]
        follows, admitted = self.follows(scene, name, before, scene.now)
        assert scene.state is follows
        ended = before is not NONE and follows is NONE
        failed = ended and not admitted and name not in ("revoke", "cancel", "lose router")
        closes = ended and before is OPEN
        assert len(scene.closing) == num_closing + closes - (name == "close late")
        assert (Admit in kinds) == admitted
        assert (OpenReceive in kinds) == (follows is OPEN and before is not OPEN)
        assert (Abandon in kinds) == (name == "cancel")
        assert (Report in kinds) == (failed or (name == "ask" and before is not NONE))
        assert admission.num_stale == num_stale + (before in STALE.get(name, ()))
        assert admission.num_expired == num_expired + (failed and name in TICKS)


WAYS: dict[State, str | None] = {NONE: None, PENDING: "request", OWN: "ask", OPEN: "request"}


def possible(scene: Scene, name: str) -> bool:
    """The transfer speaks only of what there is."""
    return bool(scene.closing) or not name.endswith("late")


@pytest.mark.parametrize("with_closing", [False, True])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", NEXT)
def test_every_event_in_every_state_is_in_the_table_or_rejected(
    name: str, state: State, with_closing: bool
) -> None:
    scene, model = Scene(), Model()
    if with_closing:
        model.advance(scene, "request")
        model.advance(scene, "revoke")
    scene.room = state is OPEN
    if (way := WAYS[state]) is not None:
        model.advance(scene, way)
    scene.room = state not in (PENDING, OWN)
    assert scene.state is state
    if possible(scene, name):
        model.advance(scene, name)


def test_the_table_names_what_can_happen_and_nothing_else() -> None:
    by_request = {GrantRequest, Handoff, Revoke, Asked, Cancelled}
    of_all = {RouterLost, Tick}  # of those requests that have a grant
    by_number = {Received, Loaded, ReceiveFailed, Closed}
    kinds = {get_origin(kind) or kind for kind in get_args(Event)}
    assert by_request | of_all | by_number == kinds - {FromPeer} | {*get_args(Offer)}
    assert {state: row.keys() for state, row in TRANSITIONS.items()} == {
        None: by_request | by_number,
        PENDING: by_request | of_all,
        OPEN: by_request | of_all | {Received, Loaded, ReceiveFailed},
        CLOSING: by_number,
    }


def test_what_prefill_asks_again_it_is_told_again() -> None:
    scene = Scene()
    told = scene.happen("request")[-1]
    assert isinstance(told, Reply)
    assert isinstance(told.message, Grant)
    assert scene.happen("request") == [told]


@settings(max_examples=400, deadline=None)
@given(
    events=st.lists(
        st.sampled_from([*NEXT, "request", "hand off", "receive", "room", "no room"]), max_size=40
    )
)
def test_grants_go_as_the_model_does_in_any_order_of_events(events: list[str]) -> None:
    scene, model = Scene(), Model()
    for name in events:
        if name.endswith("room"):
            scene.room = name == "room"
        elif possible(scene, name):
            model.advance(scene, name)
    scene.happen("cancel")
    while scene.closing:
        scene.happen("close late")
    assert scene.admission.grants.num_open == 0
    assert scene.pool.num_used == sum(map(len, scene.admitted))
