"""Prefill's hand-offs and decode's admission against each other: one thing out of the ordinary."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from decode import admission_events as adm
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from kvtransfer.config import TransferConfig
from prefill import handoff_events as hand
from prefill.handoff import Handoffs
from prefill.lease import Lease, LeaseState
from protocol.messages import Accepted, Grant, GrantRefused, PeerAddress, Revoke
from protocol.sampling import SamplingParams
from router.lifecycle import RequestState
from tests.fake_model import generate
from tests.handoff_simulation import (
    DECODE,
    EPOCH,
    FINGERPRINT,
    Fault,
    Setup,
    Simulation,
    outcome,
)

# One request, one thing out of the ordinary --------------------------------------------------

GREEDY = SamplingParams(max_tokens=6)
PROMPT = list(range(10, 21))  # 11 tokens, 3 blocks
CLOSING_STALL = TransferConfig().closing_stall


def simulate(seed: int = 0, **sizes: int) -> Simulation:
    return Simulation(Setup(**sizes), Random(seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12, 16])
def test_prompts_around_the_block_size(length: int) -> None:
    simulation = simulate()
    request = simulation.submit(list(range(length)), GREEDY)
    simulation.settle()
    assert outcome(request) == "finished"


def test_one_token_needs_no_grant() -> None:
    simulation = simulate(decode_blocks=1)  # decode could not even take it
    request = simulation.submit(PROMPT, SamplingParams(max_tokens=1))
    simulation.settle()
    assert outcome(request) == "finished"
    assert simulation.decode.pool.prefix_queries == 0


def test_first_token_is_a_stop_with_a_grant_open() -> None:
    stop = generate(PROMPT, GREEDY)[0]
    for seed in range(20):
        simulation = simulate(seed)
        request = simulation.submit(PROMPT, SamplingParams(max_tokens=6, stop_token_ids=(stop,)))
        simulation.settle()
        assert outcome(request) == "finished"
        assert request.tokens == [stop]


def test_a_prompt_that_decode_holds_entirely_moves_nothing() -> None:
    simulation = simulate()
    prompt = list(range(12))
    for _ in range(2):
        request = simulation.submit(prompt, GREEDY)
        simulation.settle()
        assert outcome(request) == "finished"
    before = simulation.decode.pool.prefix_hits
    request = simulation.submit(prompt, GREEDY)
    while not simulation.idle():
        simulation.step()
        assert simulation.prefill.plane.transport.quiet
    assert outcome(request) == "finished"
    assert simulation.decode.pool.prefix_hits - before == len(prompt)


def test_a_damaged_block_is_never_served() -> None:
    simulation = simulate()
    simulation.befall(Fault.CORRUPT)
    request = simulation.submit(PROMPT, GREEDY)
    simulation.settle()
    assert outcome(request) == "finished"
    assert simulation.decode.admission.integrity_failures == {"digest": 1}


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_request_too_long_for_a_pool_is_refused_and_holds_nobody_up(where: str) -> None:
    simulation = simulate(**{f"{where}_blocks": 4})
    too_long = simulation.submit(list(range(17)), GREEDY)
    fits = simulation.submit([1, 2, 3], GREEDY)
    simulation.settle()
    assert outcome(too_long) == "context_length_exceeded"
    assert outcome(fits) == "finished"


def test_an_empty_prompt_ends() -> None:
    simulation = simulate()
    request = simulation.submit([], GREEDY)
    simulation.settle()
    assert [error.code for error in request.errors] == ["invalid_request"]


def test_prompt_logprobs_that_fit_no_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sequence.MAX_LOGPROBS", 40)
    simulation = simulate()
    for alternatives, length, codes in ((1, 10, []), (1, 11, ["invalid_request"]), (None, 11, [])):
        sampling = GREEDY.model_copy(update={"prompt_logprobs": alternatives})
        request = simulation.submit([1] * length, sampling)
        simulation.settle()
        assert [error.code for error in request.errors] == codes


def test_a_request_that_just_fits_both_pools() -> None:
    simulation = simulate(prefill_blocks=3, decode_blocks=4)
    requests = [simulation.submit([i] * 10, GREEDY) for i in range(3)]
    simulation.settle()
    assert [outcome(request) for request in requests] == ["finished"] * 3


@pytest.mark.parametrize("seed", range(5))
def test_cancel_after_every_number_of_events(seed: int) -> None:
    for num_events in range(200):
        simulation = simulate(seed)
        request = simulation.submit(PROMPT, GREEDY)
        bystander = simulation.submit(PROMPT[:7], GREEDY)
        for _ in range(num_events):
            simulation.step()
        ended = request.lifecycle.state is RequestState.ENDED
        simulation.router.cancel(request)
        simulation.settle()
        assert outcome(request) == ("finished" if ended else "cancelled")
        assert outcome(bystander) == "finished"


@pytest.mark.parametrize("seed", range(5))
def test_deadline_after_every_number_of_events(seed: int) -> None:
    states = set()
    # With the smaller steps the grant comes before the first token, with the larger ones after it.
    for num_events, step in product(range(90), (4, 8)):
        simulation = simulate(90 * seed + num_events, max_num_batched_tokens=step)
        request = simulation.submit(PROMPT, GREEDY, timeout=10.0)
        for _ in range(num_events):
            simulation.step()
        lease = simulation.prefill.handoffs.lease(request.lifecycle.attempt_id)
        states.add(lease.state if lease else None)
        simulation.tick(10.0)
        simulation.settle()
        assert outcome(request) in ("finished", "deadline_exceeded")
    assert states == {*LeaseState, None}


# One state machine, messages by hand ----------------------------------------------------------


def leased() -> tuple[Simulation, Lease]:
    """A simulation whose one prompt was handed off and not answered yet."""
    simulation = simulate()
    simulation.submit(PROMPT, GREEDY)
    while True:
        simulation.step()
        lease = simulation.prefill.handoffs.lease("r0#1")
        if lease is not None and lease.state is LeaseState.OFFERED:
            return simulation, lease


def granted() -> tuple[Simulation, int]:
    """A simulation whose one prompt has a grant that prefill does not know of yet."""
    simulation = simulate()
    simulation.submit(PROMPT, GREEDY)
    while not simulation.decode.grants:
        simulation.step()
    return simulation, next(iter(simulation.decode.grants))


def hear(
    handoffs: Handoffs, answer: Grant | GrantRefused | Accepted, worker_id: str = DECODE
) -> list[hand.Action]:
    return handoffs.handle(hand.FromPeer(worker_id, answer), 0.0)


def test_a_refusal_that_comes_late_changes_nothing() -> None:
    simulation, _ = leased()
    late = GrantRefused(request_id="r0#1", code="overloaded", message="late")
    assert hear(simulation.prefill.handoffs, late) == []
    simulation.check()
    simulation.settle()
    assert outcome(simulation.requests["r0"]) == "finished"


def test_a_second_grant_changes_nothing() -> None:
    simulation, lease = leased()
    assert lease.grant is not None
    assert hear(simulation.prefill.handoffs, lease.grant) == []
    simulation.settle()
    assert outcome(simulation.requests["r0"]) == "finished"


def test_accepted_twice_and_for_unknown_requests() -> None:
    simulation, lease = leased()
    assert lease.grant is not None
    accepted = Accepted(request_id="r0#1", grant_id=lease.grant.grant_id)
    for _ in range(2):
        assert hear(simulation.prefill.handoffs, accepted) == []
        assert simulation.prefill.handoffs.num_open == 0
        simulation.check()


def test_a_grant_after_cancel_is_revoked_once_and_not_used() -> None:
    simulation, grant_id = granted()
    [abandon, tell] = simulation.prefill.handoffs.handle(hand.Cancelled("r0#1"), 0.0)
    assert abandon == hand.Abandon("r0#1")
    assert isinstance(tell, hand.Tell)
    assert tell.message == Revoke(request_id="r0#1")
    grant = Grant(
        request_id="r0#1",
        grant_id=grant_id,
        epoch=EPOCH,
        num_cached_tokens=0,
        blocks=[0, 1, 2],
        expires_in=1.0,
    )
    assert hear(simulation.prefill.handoffs, grant) == []
    assert simulation.prefill.handoffs.num_open == 0


def test_a_grant_of_the_wrong_size_fails_the_request() -> None:
    simulation = simulate()
    request = simulation.submit(PROMPT, GREEDY)
    while not simulation.decode.grants:
        simulation.step()
    [grant_id] = simulation.decode.grants
    wrong = Grant(
        request_id="r0#1",
        grant_id=grant_id,
        epoch=EPOCH,
        num_cached_tokens=0,
        blocks=[0, 1],
        expires_in=1.0,
    )
    simulation.prefill.handle(hand.FromPeer(DECODE, wrong))
    simulation.settle()
    assert outcome(request) == "protocol_error"


def test_two_decode_workers_may_pick_the_same_grant_id() -> None:
    pool = BlockPool(8, 4)
    handoffs = Handoffs(pool, FINGERPRINT)
    peer = PeerAddress(worker_id=DECODE, epoch=EPOCH, control="", data=b"")
    sequences = [Sequence(name, [i] * 9, 9, GREEDY) for i, name in enumerate("ab")]
    answers = []
    for sequence in sequences:
        assert pool.reserve(sequence, 0)
        sequence.num_computed = 8
        handoffs.handle(hand.Queued(sequence, "router", peer, deadline=9.0), 0.0)
        handoffs.handle(hand.Ask(sequence.request_id), 0.0)
        grant = Grant(
            request_id=sequence.request_id,
            grant_id=5,
            epoch=EPOCH,
            num_cached_tokens=0,
            blocks=[0, 1, 2],
            expires_in=9.0,
        )
        answers.append(hear(handoffs, grant))
    assert answers[0] == [hand.Allow("a"), hand.Ship(peer, 5, 0, [0, 1], [0, 1])]
    assert [type(action) for action in answers[1]] == [hand.Abandon, hand.Tell, hand.Report]
    handoffs.handle(hand.Shipped(5, 0, [1, 2]), 0.0)
    handoffs.handle(hand.Cancelled("a"), 0.0)
    assert handoffs.num_open == 0
    pool.check_integrity([sequence.block_table for sequence in sequences])


@pytest.mark.parametrize("by_router", [True, False])
def test_the_router_stops_a_running_sequence_and_prefill_does_not(by_router: bool) -> None:
    simulation = simulate()
    request = simulation.submit(PROMPT, SamplingParams(max_tokens=100))
    while not simulation.decode.scheduler.running:
        simulation.step()
    revoke = adm.FromPeer(b"prefill", Revoke(request_id="r0#1"))
    simulation.decode.handle(adm.Cancelled("r0#1") if by_router else revoke)
    assert bool(simulation.decode.scheduler.running) != by_router
    simulation.check()
    if not by_router:
        simulation.settle()
        assert outcome(request) == "finished"


def test_a_block_is_free_only_when_the_transport_says_so() -> None:
    simulation, grant_id = granted()
    simulation.decode.handle(adm.Cancelled("r0#1"))
    simulation.decode.handle(adm.Tick())
    grants = simulation.decode.admission.grants
    assert grants.num_quarantined_blocks == simulation.decode.pool.num_used == 3
    simulation.tick(1e6)
    assert grants.num_quarantined_blocks == 3
    simulation.decode.handle(adm.Closed(grant_id))
    assert simulation.decode.pool.num_used == 0
    assert simulation.decode.admission.handle(adm.Closed(grant_id), 0.0) == []


def test_a_frozen_sender_keeps_blocks_no_longer_than_the_closing_stall() -> None:
    """It stops in the middle of a message, and then its grant is given up."""
    simulation = simulate(max_num_batched_tokens=4)
    simulation.submit(PROMPT, GREEDY)
    decode = simulation.decode
    while not decode.plane.counters.receives_in_flight:
        simulation.step()
    decode.handle(adm.Cancelled("r0#1"))
    quarantined: list[int] = []
    for seconds in (0.0, 0.9 * CLOSING_STALL, 0.2 * CLOSING_STALL):
        simulation.tick(seconds)
        run_transfer(simulation)
        quarantined.append(decode.admission.grants.num_quarantined_blocks)
        simulation.check()
    assert quarantined == [3, 3, 0]
    assert decode.pool.num_used == 0
    simulation.settle()


def run_transfer(simulation: Simulation) -> None:
    """Decode's transfer thread runs, and no message ends by itself."""
    for _ in range(4):
        simulation.decode.plane.nap_ends()
        simulation.decode.plane.events()[-1]()
    while (reports := "transfer>inproc-decode") in simulation.channels:
        simulation.deliver(reports)
