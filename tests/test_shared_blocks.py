"""Hand-offs that count on blocks which come under another one: what moves, and who runs when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from decode.admission import LATE_BLOCKS, Admission
from decode.admission_events import (
    Admit,
    Cancelled,
    Closed,
    CloseReceive,
    Event,
    FromPeer,
    Received,
    Reply,
    RouterLost,
    Tick,
)
from engine.block_pool import BlockPool
from protocol.messages import Grant, GrantRequest, Handoff, Revoke
from protocol.sampling import SamplingParams
from tests.fake_model import VOCAB
from tests.handoff_simulation import EPOCH, FINGERPRINT

BLOCK = FINGERPRINT.geometry.block_size
COMMON = [0] * (3 * BLOCK)
PEER, STRANGER = b"prefill", b"another prefill worker"
QUIET = 30.0  # seconds of a grant under which nothing comes


class Scene:
    """A decode worker's admission, with the test as prefill, transfer and scheduler."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, BLOCK)
        self.admission = Admission(
            self.pool,
            FINGERPRINT,
            EPOCH,
            vocab_size=VOCAB,
            headroom=lambda: 0,
            grant_timeout=QUIET,
            new_grant_id=count(1).__next__,
        )
        self.now = 0.0
        self.grants: dict[str, Grant] = {}
        self.admitted: dict[str, list[int]] = {}  # their blocks
        self.closing: list[int] = []  # grant ids

    def handle(self, event: Event) -> None:
        for action in self.admission.handle(event, self.now):
            match action:
                case Reply(_, Grant() as grant):
                    self.grants[grant.request_id] = grant
                case Admit(sequence):
                    self.admitted[sequence.request_id] = sequence.block_table
                case CloseReceive(grant_id):
                    self.closing.append(grant_id)
        owned = [*self.admission.grants.owned_blocks(), *self.admitted.values()]
        self.pool.check_integrity(owned)

    def ask(self, name: str, tokens: list[int], peer: bytes = PEER) -> Grant:
        """A prefill worker asks for a grant."""
        request = GrantRequest(
            request_id=name,
            router_id="router",
            epoch=EPOCH,
            fingerprint=FINGERPRINT,
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(max_tokens=9),
            timeout=1000.0,
        )
        self.handle(FromPeer(peer, request))
        return self.grants[name]

    def hand_off(self, name: str, digest: int = 0) -> None:
        """Everything under the request's grant arrives. Its blocks' digests are 0."""
        grant = self.grants[name]
        self.handle(Received(grant.grant_id, 0, [0] * len(grant.blocks)))
        known = self.admission.grants.of_request(name)
        assert known is not None
        handoff = Handoff(
            request_id=name,
            grant_id=grant.grant_id,
            epoch=EPOCH,
            first_token=1,
            num_tokens=known.sequence.num_tokens,
            digests=[digest] * len(grant.blocks),
        )
        self.handle(FromPeer(PEER, handoff))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())


@pytest.fixture
def scene() -> Iterator[Scene]:
    """What is closing in the end gives everything back."""
    scene = Scene()
    yield scene
    for grant_id in scene.closing:
        scene.handle(Closed(grant_id))
    assert scene.admission.grants.num_open == 0
    assert scene.pool.num_used == len({b for blocks in scene.admitted.values() for b in blocks})


def test_what_prompts_have_in_common_comes_once_and_nobody_runs_before_it_is_there(
    scene: Scene,
) -> None:
    first = scene.ask("first", [*COMMON, 1])
    others = [scene.ask(f"{number}", [*COMMON, number]) for number in range(2, 5)]
    assert (first.num_cached_tokens, len(first.blocks)) == (0, 4)
    assert {(g.num_cached_tokens, len(g.blocks)) for g in others} == {(len(COMMON), 1)}
    scene.hand_off("3")
    scene.hand_off("2")
    assert not scene.admitted
    scene.wait(2 * LATE_BLOCKS)  # the first is late, and so are they
    assert not scene.admitted
    scene.hand_off("first")
    scene.hand_off("4")
    assert set(scene.admitted) == {"first", "2", "3", "4"}
    assert len({tuple(blocks[:3]) for blocks in scene.admitted.values()}) == 1
    assert len({blocks[3] for blocks in scene.admitted.values()}) == 4


def test_a_prompt_all_of_which_comes_for_another_one_moves_nothing(scene: Scene) -> None:
    scene.ask("first", COMMON)
    assert scene.ask("second", COMMON).blocks == []
    scene.hand_off("second")
    scene.hand_off("first")
    assert scene.admitted["first"] == scene.admitted["second"]


@pytest.mark.parametrize("handed_off", ["before", "after"])
@pytest.mark.parametrize("end", ["revoked", "cancelled", "damaged", "silent"])
def test_without_what_it_shared_a_prompt_is_computed_anew(
    scene: Scene, end: str, handed_off: str
) -> None:
    scene.ask("first", [*COMMON, 1])
    scene.ask("second", [*COMMON, 2])
    if handed_off == "before":
        scene.hand_off("second")
    match end:
        case "revoked":
            scene.handle(FromPeer(PEER, Revoke(request_id="first")))
        case "cancelled":
            scene.handle(Cancelled("first"))
        case "damaged":
            scene.hand_off("first", digest=7)
        case "silent":
            scene.wait(QUIET)
    if handed_off == "after":
        scene.hand_off("second")
    assert scene.admitted == ({"first": []} if end == "damaged" else {}) | {"second": []}


@pytest.mark.parametrize("end", ["handed off", "revoked"])
def test_the_silence_under_a_grant_counts_from_the_end_of_what_it_waited_for(
    scene: Scene, end: str
) -> None:
    first = scene.ask("first", [*COMMON, 1])
    scene.ask("second", [*COMMON, 2])
    scene.wait(QUIET - 1)
    scene.handle(Received(first.grant_id, 0, [0]))
    scene.wait(QUIET - 1)
    if end == "revoked":
        scene.handle(FromPeer(PEER, Revoke(request_id="first")))
    else:
        scene.hand_off("first")
    scene.wait(QUIET - 1)
    scene.hand_off("second")
    whole = end == "handed off"
    assert len(scene.admitted["second"]) == (4 if whole else 0)


def test_under_a_grant_whose_leader_has_ended_nothing_may_come_for_as_long_as_under_another(
    scene: Scene,
) -> None:
    scene.ask("first", [*COMMON, 1])
    scene.ask("second", [*COMMON, 2])
    scene.wait(QUIET - 1)
    scene.hand_off("first")
    scene.wait(QUIET)
    assert len(scene.closing) == 2
    assert "second" not in scene.admitted


def test_a_prompt_counts_only_on_what_comes_as_soon_as_it_does(scene: Scene) -> None:
    scene.ask("longer", [*COMMON, *[1] * (BLOCK + 2)])
    assert scene.ask("second", [*COMMON, 2]).num_cached_tokens == 0
    assert scene.ask("elsewhere", [*COMMON, 3], STRANGER).num_cached_tokens == 0
    third = scene.ask("third", [*COMMON, *[4] * BLOCK])
    assert third.num_cached_tokens == len(COMMON)
    fourth = scene.ask("fourth", [*COMMON, *[4] * BLOCK, 5])  # the third, too, waits for another
    assert fourth.num_cached_tokens == len(COMMON)
    scene.handle(RouterLost("router"))


def test_a_lost_router_ends_those_that_shared_and_nobody_runs(scene: Scene) -> None:
    scene.ask("first", [*COMMON, 1])
    scene.ask("second", [*COMMON, 2])
    scene.hand_off("second")
    scene.handle(RouterLost("router"))
    assert not scene.admitted
    assert len(scene.closing) == 2


def test_a_prompt_whose_own_deadline_passes_waits_for_nobody(scene: Scene) -> None:
    scene.ask("first", [*COMMON, 1])
    scene.ask("second", [*COMMON, 2])
    scene.hand_off("second")
    scene.wait(2000.0)
    assert not scene.admitted
    assert len(scene.closing) == 2
