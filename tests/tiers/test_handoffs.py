"""Chats over a decode worker that forgets them between two turns, with a tier that does not.

The real admission, scheduler, pool and transfer; ``tests.handoff_simulation`` checks who writes
where and who owns each block after every event, and the outcome that every token is right.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from protocol.sampling import SamplingParams
from tests.handoff_simulation import Request, Setup, Simulation, outcome

BLOCK = 4  # tokens
NUM_SEEDS = 120


def evict(simulation: Simulation) -> None:
    """Let decode's pool forget everything."""
    pool = simulation.decode.pool
    blocks = pool.allocate(pool.num_free)
    assert blocks is not None
    pool.release(blocks)


def next_turn(request: Request, user: int) -> list[int]:
    return [*request.prompt, *request.tokens, *[user] * 5]


def run(seed: int, fault_rate: float) -> tuple[Simulation, list[Request]]:
    """Three users' turns, some of them at once."""
    random = Random(seed)
    setup = Setup(
        decode_blocks=random.choice((14, 20)),
        tier_blocks=random.choice((4, 60)),
        max_num_batched_tokens=random.choice((3, 64)),
        alone=random.choice((0.0, 0.0, 0.4)),
    )
    simulation = Simulation(setup, random)
    prompts = {user: [user] * random.randrange(1, 12) for user in range(3)}
    requests: list[Request] = []
    for _ in range(random.randint(2, 4)):
        turns = {}
        for user in random.sample([*prompts], random.randint(1, 3)):
            sampling = SamplingParams(max_tokens=random.choice((2, 5)))
            turns[user] = simulation.submit(prompts[user], sampling, max_retries=3)
            for _ in range(random.randrange(40)):
                simulation.step(fault_rate)
        simulation.settle()
        if random.random() < 0.8:
            evict(simulation)
        prompts |= {user: next_turn(request, user) for user, request in turns.items()}
        requests += turns.values()
    return simulation, requests


def test_every_chat_ends_clean_and_with_the_right_tokens() -> None:
    outcomes: Counter[str] = Counter()
    loaded = missed = 0
    for seed in range(NUM_SEEDS):
        try:
            simulation, requests = run(seed, fault_rate=(0.0, 0.02, 0.1)[seed % 3])
            outcomes.update(map(outcome, requests))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        loaded += simulation.decode.tier.num_loaded
        missed += simulation.decode.tier.num_missed
    assert outcomes["finished"] > NUM_SEEDS
    assert loaded > NUM_SEEDS
    assert missed > NUM_SEEDS // 20  # lost between the promise and the load


@pytest.mark.parametrize("tier_blocks", [0, 60])
def test_what_the_tier_holds_does_not_travel(tier_blocks: int) -> None:
    setup = Setup(tier_blocks=tier_blocks, max_num_batched_tokens=64)
    simulation = Simulation(setup, Random(1))
    first = simulation.submit([7] * 13, SamplingParams(max_tokens=8))
    simulation.settle()
    evict(simulation)
    counters = simulation.decode.plane.counters
    before = counters.bytes_received
    second = simulation.submit(next_turn(first, 7), SamplingParams(max_tokens=8))
    simulation.settle()
    assert [outcome(first), outcome(second)] == ["finished", "finished"]
    total = -(-len(second.prompt) // BLOCK)
    held = (len(first.prompt) + len(first.tokens) - 1) // BLOCK if tier_blocks else 0
    assert simulation.decode.tier.num_loaded == held
    assert counters.bytes_received - before == (total - held) * BLOCK * 8


def test_what_the_tier_has_lost_meanwhile_is_computed() -> None:
    simulation = Simulation(Setup(tier_blocks=60, max_num_batched_tokens=64), Random(2))
    first = simulation.submit([7] * 13, SamplingParams(max_tokens=8))
    simulation.settle()
    evict(simulation)
    second = simulation.submit(next_turn(first, 7), SamplingParams(max_tokens=8))
    tier = simulation.decode.tier
    while tier.quiet:
        simulation.step()
    names = [*tier._rows]
    del tier._rows[names[2]]
    simulation.settle()
    assert outcome(second) == "finished"
    assert (tier.num_loaded, tier.num_missed) == (2, 3)
    assert not simulation.decode.admission.integrity_failures
    assert simulation.decode.pool.prefix_hits == 2 * BLOCK  # the others were computed
