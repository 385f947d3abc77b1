"""Thousands of histories of one prefill and one decode worker, with faults at every turn.

In some of them decode computes prompts itself, beside the handed-off ones or all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from kvtransfer.config import TransferConfig
from prefill.lease import LeaseState
from protocol.sampling import SamplingParams
from tests.handoff_simulation import EPOCH, FINGERPRINT, Fault, Request, Setup, Simulation, outcome
from tests.handoff_simulation.setup import GEOMETRY

NUM_SEEDS = 2000
OTHER_WEIGHTS = FINGERPRINT.model_copy(update={"weights_digest": "ff"})
PROMPT = list(range(10, 21))  # 11 tokens, 3 blocks
ROW = GEOMETRY.block_size * 8  # bytes of a block in the simulated memory


def random_transfer(random: Random) -> TransferConfig:
    """Blocks one by one or many in a message, straight or packed, with room or hardly any."""
    return TransferConfig(
        stage_below=random.choice((0, 2 * ROW)),
        staging_bytes=random.choice((ROW, 2 * ROW, 8 * ROW)),
        staging_slots=random.choice((1, 2, 8)),
        message_bytes=random.choice((ROW, 2 * ROW, 8 * ROW)),
        max_in_flight=random.choice((1, 2, 32)),
    )


def random_setup(random: Random) -> Setup:
    """Two workers, small ones as often as roomy ones."""
    return Setup(
        prefill_blocks=random.choice((6, 9, 32)),
        decode_blocks=random.choice((6, 9, 14, 40)),
        max_num_batched_tokens=random.choice((1, 3, 8, 16, 64)),
        max_num_seqs=random.choice((1, 2, 5)),
        ask_ahead=random.choice((1, 4, 13, 64)),
        prefill_fingerprint=OTHER_WEIGHTS if random.random() < 0.03 else FINGERPRINT,
        transfer=random_transfer(random),
        alone=random.choice((0.0, 0.0, 0.0, 0.4, 1.0)),
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
    refused: Counter[str] = Counter()
    recomputed = preempted = resumed = failed_sends = failed_receives = 0
    for seed in range(NUM_SEEDS):
        with named(seed):
            simulation = run(seed, fault_rate=(0.0, 0.02, 0.1)[seed % 3])
            outcomes.update(map(outcome, simulation.requests.values()))
        recomputed += simulation.decode.admission.integrity_failures.get("digest", 0)
        preempted += simulation.decode.scheduler.num_preemptions
        resumed += sum(
            request.num_attempts > 1 and request.finish_reason is not None
            for request in simulation.requests.values()
        )
        refused.update(simulation.decode.plane.counters.refused)
        failed_sends += simulation.prefill.plane.counters.failed_sends
        failed_receives += simulation.decode.plane.counters.failed_receives
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
    assert min(recomputed, failed_sends, failed_receives) > rare
    assert preempted > 5 * rare
    assert resumed > 10 * rare


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("which", range(3))
def test_one_fault_is_survived(fault: Fault, which: int) -> None:
    """Message ``which`` of three suffers. One that vanishes holds up its connection until that
    is given up, and the next attempt with it.
    """
    transfer = TransferConfig(message_bytes=ROW, stage_below=0, max_in_flight=1)
    simulation = Simulation(Setup(transfer=transfer, max_num_batched_tokens=64), Random(which))
    request = simulation.submit(PROMPT, SamplingParams(max_tokens=6), max_retries=2)
    transport = simulation.prefill.plane.transport
    for _ in range(which):
        let_one_go(simulation)
    simulation.befall(fault)
    let_one_go(simulation)
    assert transport.armed is None
    simulation.settle()
    assert outcome(request) == "finished"
    corrupted = simulation.decode.admission.integrity_failures.get("digest", 0)
    assert corrupted == (fault is Fault.CORRUPT)


@pytest.mark.parametrize(
    ("state", "max_num_batched_tokens"),
    [
        (LeaseState.ASKED, 4),
        (LeaseState.AHEAD, 64),
        (LeaseState.SHIPPING, 4),
        (LeaseState.DRAINING, 64),
        (LeaseState.OFFERED, 64),
    ],
)
def test_a_connection_that_breaks_costs_one_attempt_at_most(
    state: LeaseState, max_num_batched_tokens: int
) -> None:
    simulation = Simulation(Setup(max_num_batched_tokens=max_num_batched_tokens), Random(1))
    request = simulation.submit(PROMPT, SamplingParams(max_tokens=6), max_retries=1)
    for _ in range(1000):
        lease = simulation.prefill.handoffs.lease("r0#1")
        if lease is not None and lease.state is state:
            break
        simulation.step()
    else:
        pytest.fail(f"never {state.name}")
    simulation.network.lost = True
    simulation.decode.plane.transport.close_incoming()
    simulation.settle()
    assert outcome(request) == "finished"


def let_one_go(simulation: Simulation) -> None:
    """Until one more message has left its connection."""
    transport = simulation.prefill.plane.transport
    num_sent = transport.num_let_go
    while transport.num_let_go == num_sent:
        simulation.step()
