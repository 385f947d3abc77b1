"""A request's priority on its way: the router's queue, prefill, decode, and back to the queue."""

from __future__ import annotations

from decode.admission import Admission
from decode.admission_events import Admit, Asked, Tick
from decode.grant import without_blocks
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill.lease import Lease
from protocol.messages import (
    GenerateRequest,
    GrantRequest,
    PeerAddress,
    PrefillRequest,
)
from protocol.sampling import SamplingParams
from router.generation import GenerationRequest
from tests.handoff_simulation import EPOCH, FINGERPRINT
from tests.router_scene import ONE_SLOT, Scene, first, tokens

SAMPLING = SamplingParams(max_tokens=2)


def asked(scene: Scene) -> list[tuple[str, int]]:
    """What prefill was asked for, in order."""
    return [(m.request_id, m.priority) for m in scene.wire.all(PrefillRequest)]


def test_the_router_gives_the_lowest_number_to_the_workers_first_and_tells_it() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    for name, priority in (("r", 0), ("bulk", 7), ("usual", 0), ("urgent", -7)):
        scene.dispatch(GenerationRequest(name, [1, 2, 3], SAMPLING, priority=priority))
    assert asked(scene) == [("r#1", 0)]
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8, last=True))
    assert asked(scene) == [("r#1", 0), ("urgent#1", -7)]


def test_prefill_tells_decode() -> None:
    request = GenerateRequest(
        request_id="r",
        token_ids=[1, 2, 3],
        num_prompt_tokens=3,
        sampling=SAMPLING,
        priority=-4,
        timeout=9.0,
    )
    decode = PeerAddress(worker_id="d0", epoch=EPOCH, control="", data=b"")
    lease = Lease(Sequence.of(request), "router", decode, deadline=9.0)
    question = lease.question(FINGERPRINT, now=0.0)
    assert isinstance(question, GrantRequest)
    assert question.priority == -4
    assert without_blocks(Sequence.of(question)).priority == -4


def test_decode_gives_memory_to_the_lowest_number_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    admission = Admission(pool, FINGERPRINT, EPOCH, vocab_size=97, headroom=lambda: 0)
    taken = pool.allocate(4)
    assert taken is not None
    for name, priority in (("bulk", 2), ("usual", 0), ("urgent", -2), ("too", -2)):
        request = GenerateRequest(
            request_id=name,
            token_ids=[1] * 10,
            num_prompt_tokens=10,
            sampling=SAMPLING,
            priority=priority,
            timeout=9.0,
        )
        assert admission.handle(Asked("router", request), now=0.0) == []
    order = []
    pool.release(taken)
    while actions := admission.handle(Tick(), now=1.0):
        [admit] = actions
        assert isinstance(admit, Admit)
        order.append(admit.sequence.request_id)
        pool.release_sequence(admit.sequence)
    assert order == ["urgent", "too", "usual", "bulk"]
