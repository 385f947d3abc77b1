"""Prefill's hand-offs and decode's admission against each other, over thousands of schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from decode import admission as adm
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill import handoff as hand
from prefill.handoff import Handoffs
from protocol.messages import Accepted, Grant, GrantRefused, Handoff, PeerAddress, Revoke
from protocol.sampling import SamplingParams
from router.lifecycle import RequestState
from tests.fake_model import generate
from tests.handoff_simulation import EPOCH, FINGERPRINT, Request, Setup, Simulation

NUM_SEEDS = 2000
OTHER_WEIGHTS = FINGERPRINT.model_copy(update={"weights_digest": "ff"})


def outcome(request: Request) -> str:
    """How a request ended; asserts that it ended once and with the right tokens."""
    expected = generate(request.prompt, request.sampling)
    assert request.lifecycle.state is RequestState.ENDED
    assert request.tokens == expected[: len(request.tokens)]
    ends = [error.code for error in request.errors]
    if request.finish_reason is not None:
        assert request.tokens == expected
        ends.append("finished")
    if request.cancelled:
        ends.append("cancelled")
    assert len(ends) == 1, ends
    return ends[0]


def random_setup(random: Random) -> Setup:
    """Two workers, small ones as often as roomy ones."""
    return Setup(
        prefill_blocks=random.choice((6, 9, 32)),
        decode_blocks=random.choice((6, 9, 14, 40)),
        max_num_batched_tokens=random.choice((1, 3, 8, 16, 64)),
        max_num_seqs=random.choice((1, 2, 5)),
        ask_ahead=random.choice((1, 4, 13, 64)),
        prefill_fingerprint=OTHER_WEIGHTS if random.random() < 0.03 else FINGERPRINT,
    )


def random_request(simulation: Simulation, random: Random) -> Request:
    """A request; its prompt shares a prefix with others, and ends on a block's edge at times."""
    family = random.randrange(3)
    prompt = [family] * random.choice((1, 3, 4, 5, 8, 11, 12, 20))
    prompt[random.randrange(len(prompt)) :] = [random.randrange(3)]
    max_tokens = random.choice((1, 2, 3, 5, 9, 30))
    stops = tuple(random.sample(range(1000), random.choice((0, 0, 100))))
    return simulation.submit(
        prompt,
        SamplingParams(max_tokens=max_tokens, stop_token_ids=stops),
        timeout=random.choice((1e9, 1e9, 5.0)),
        epoch=EPOCH + (random.random() < 0.05),
        max_retries=random.choice((0, 3)),
    )


def run(seed: int, fault_rate: float) -> Simulation:
    """One random history, to its very end."""
    random = Random(seed)
    simulation = Simulation(random_setup(random), random)
    for _ in range(random.randint(1, 6)):
        random_request(simulation, random)
        for _ in range(random.randrange(25)):
            simulation.step(fault_rate)
    simulation.settle()
    return simulation


@contextmanager
def named(seed: int) -> Iterator[None]:
    """Say which seed failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def test_every_history_ends_clean_and_with_the_right_tokens() -> None:
    outcomes: Counter[str] = Counter()
    recomputed = preempted = resumed = 0
    for seed in range(NUM_SEEDS):
        with named(seed):
            simulation = run(seed, fault_rate=(0.0, 0.02, 0.1)[seed % 3])
            outcomes.update(map(outcome, simulation.requests.values()))
            recomputed += simulation.admission.integrity_failures.get("digest", 0)
            preempted += simulation.decode.num_preemptions
            resumed += sum(
                request.num_attempts > 1 and request.finish_reason is not None
                for request in simulation.requests.values()
            )
    # The histories reached what they are for.
    assert outcomes.keys() == {
        "finished",
        "cancelled",
        "worker_lost",
        "protocol_error",
        "context_length_exceeded",
        "deadline_exceeded",
    }
    assert outcomes["finished"] > NUM_SEEDS
    rare = NUM_SEEDS // 200
    assert min(outcomes.values()) > rare, outcomes
    assert recomputed > rare
    assert preempted > 5 * rare
    assert resumed > 10 * rare


# One request, one thing out of the ordinary --------------------------------------------------

GREEDY = SamplingParams(max_tokens=6)
PROMPT = list(range(10, 21))  # 11 tokens, 3 blocks


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
        assert not simulation.shipments
    assert outcome(request) == "finished"
    assert simulation.decode.pool.prefix_hits - before == len(prompt)


def test_a_damaged_block_is_never_served() -> None:
    simulation = simulate()
    simulation.corrupt = True
    request = simulation.submit(PROMPT, GREEDY)
    simulation.settle()
    assert outcome(request) == "finished"
    assert simulation.admission.integrity_failures == {"digest": 1}


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
        simulation.cancel(request)
        simulation.settle()
        assert outcome(request) == ("finished" if ended else "cancelled")
        assert outcome(bystander) == "finished"


@pytest.mark.parametrize("seed", range(5))
def test_deadline_after_every_number_of_events(seed: int) -> None:
    states = set()
    for num_events in range(60):
        simulation = simulate(seed)
        request = simulation.submit(PROMPT, GREEDY, timeout=10.0)
        for _ in range(num_events):
            simulation.step()
        lease = simulation.handoffs.lease(request.lifecycle.attempt_id)
        states.add(lease.state if lease else None)
        simulation.tick(10.0)
        simulation.settle()
        assert outcome(request) in ("finished", "deadline_exceeded")
    assert states == {*hand.LeaseState, None}


# One state machine, messages by hand ----------------------------------------------------------


def leased() -> tuple[Simulation, hand.Lease]:
    """A simulation whose one prompt was handed off and not answered yet."""
    simulation = simulate()
    simulation.submit(PROMPT, GREEDY)
    while True:
        simulation.step()
        lease = simulation.handoffs.lease("r0#1")
        if lease is not None and lease.state is hand.LeaseState.OFFERED:
            return simulation, lease


def granted() -> tuple[Simulation, int]:
    """A simulation whose one prompt has a grant that prefill does not know of yet."""
    simulation = simulate()
    simulation.submit(PROMPT, GREEDY)
    while not simulation.receives:
        simulation.step()
    return simulation, next(iter(simulation.receives))


def test_a_refusal_that_comes_late_changes_nothing() -> None:
    simulation, _ = leased()
    late = GrantRefused(request_id="r0#1", code="overloaded", message="late")
    assert simulation.handoffs.handle(late, 0.0) == []
    simulation.check()
    simulation.settle()
    assert outcome(simulation.requests["r0"]) == "finished"


def test_a_second_grant_changes_nothing() -> None:
    simulation, lease = leased()
    assert lease.grant is not None
    assert simulation.handoffs.handle(lease.grant, 0.0) == []
    simulation.settle()
    assert outcome(simulation.requests["r0"]) == "finished"


def test_accepted_twice_and_for_unknown_requests() -> None:
    simulation, lease = leased()
    assert lease.grant is not None
    accepted = Accepted(request_id="r0#1", grant_id=lease.grant.grant_id)
    for _ in range(2):
        assert simulation.handoffs.handle(accepted, 0.0) == []
        assert simulation.handoffs.num_open == 0
        simulation.check()


def test_a_grant_after_cancel_is_revoked_once_and_not_used() -> None:
    simulation, grant_id = granted()
    [abandon, tell] = simulation.handoffs.handle(hand.Cancelled("r0#1"), 0.0)
    assert abandon == hand.Abandon("r0#1")
    assert isinstance(tell, hand.Tell)
    assert tell.message == Revoke(request_id="r0#1", grant_id=0)
    grant = Grant(
        request_id="r0#1",
        grant_id=grant_id,
        epoch=EPOCH,
        num_cached_tokens=0,
        blocks=[0, 1, 2],
        expires_in=1.0,
    )
    assert simulation.handoffs.handle(grant, 0.0) == []
    assert simulation.handoffs.num_open == 0


def test_a_grant_of_the_wrong_size_fails_the_request() -> None:
    simulation = simulate()
    request = simulation.submit(PROMPT, GREEDY)
    while not simulation.receives:
        simulation.step()
    [grant_id] = simulation.receives
    wrong = Grant(
        request_id="r0#1",
        grant_id=grant_id,
        epoch=EPOCH,
        num_cached_tokens=0,
        blocks=[0, 1],
        expires_in=1.0,
    )
    simulation.to_prefill(wrong)
    simulation.settle()
    assert outcome(request) == "protocol_error"


def test_two_decode_workers_may_pick_the_same_grant_id() -> None:
    pool = BlockPool(8, 4)
    handoffs = Handoffs(pool, FINGERPRINT)
    peer = PeerAddress(worker_id="d", epoch=EPOCH, control="", data=b"")
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
        answers.append(handoffs.handle(grant, 0.0))
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
    while not simulation.decode.running:
        simulation.step()
    revoke = adm.FromPeer(b"prefill", Revoke(request_id="r0#1", grant_id=1))
    simulation.to_decode(adm.Cancelled("r0#1") if by_router else revoke)
    assert bool(simulation.decode.running) != by_router
    simulation.check()
    if not by_router:
        simulation.settle()
        assert outcome(request) == "finished"


def test_a_block_is_free_only_when_the_transport_says_so() -> None:
    simulation, grant_id = granted()
    simulation.to_decode(adm.Cancelled("r0#1"))
    simulation.to_decode(adm.Tick())
    assert simulation.admission.num_quarantined_blocks == simulation.decode.pool.num_used == 3
    simulation.tick(1e6)
    assert simulation.admission.num_quarantined_blocks == 3
    simulation.to_decode(adm.Closed(grant_id))
    assert simulation.decode.pool.num_used == 0
    assert simulation.admission.handle(adm.Closed(grant_id), 0.0) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("grant_id", 9999), ("epoch", EPOCH + 1), ("num_tokens", 12), ("digests", [1])],
)
def test_a_hand_off_on_other_terms_is_refused_by_name(field: str, value: object) -> None:
    simulation = simulate()
    request = simulation.submit(PROMPT, GREEDY)
    while not (lease := simulation.handoffs.lease("r0#1")) or not lease.grant:
        simulation.step()
    handoff = Handoff(
        request_id="r0#1",
        grant_id=lease.grant.grant_id,
        epoch=EPOCH,
        first_token=1,
        num_tokens=len(PROMPT),
        digests=[0, 0, 0],
    ).model_copy(update={field: value})
    simulation.to_decode(adm.FromPeer(b"prefill", handoff))
    simulation.settle()
    assert outcome(request) == "protocol_error"
    assert field in str(request.errors[0])
