"""How each policy chooses among workers that all have room."""

from __future__ import annotations

from collections import Counter

import pytest

from protocol.messages import WorkerLoad
from router.capacity import Demand, takes_prompt
from router.policy import POLICIES, SLACK, SPREAD, PolicyName, choose_decode, choose_pair
from router.registry import Assignment, Registry, Worker
from tests.test_registry_policy import GEOMETRY, join, registration

BLOCK = GEOMETRY.block_size
PREFIX = list(range(10))  # keys of 40 tokens
DEMAND = Demand(10 * BLOCK + 1, 60, lambda _: PREFIX)


@pytest.fixture
def registry() -> Registry:
    registry = Registry(3.0)
    for name in ("p0", "p1", "p2"):
        join(registry, registration(name))
    for name in ("d0", "d1", "d2"):
        join(registry, registration(name, "decode"))
    return registry


def worker(registry: Registry, name: str) -> Worker:
    found = registry.named(name)
    assert found is not None
    return found


def queue(registry: Registry, name: str, num_tokens: int, count: int = 1) -> None:
    computes = num_tokens if name[0] == "p" else 0
    for number in range(count):
        given = Assignment(num_tokens, num_tokens, begun=True, prompt_tokens=computes)
        registry.give(worker(registry, name), f"{name}-{number}", given)


def hold(registry: Registry, name: str, blocks: int) -> None:
    worker(registry, name).cached.keys.update(PREFIX[:blocks])


def chosen(registry: Registry, policy: PolicyName = "prefix-aware") -> tuple[str, str]:
    pair = choose_pair(registry, DEMAND, policy=POLICIES[policy])
    assert pair is not None
    assert pair.prefill is not None
    return pair.prefill.worker_id, pair.decode.worker_id


def test_the_holder_of_the_longest_prefix_is_chosen_in_both_pools(registry: Registry) -> None:
    for name, blocks in (("p1", 4), ("p2", 3), ("d0", 2), ("d2", 9)):
        hold(registry, name, blocks)
    worker(registry, "p0").cached.keys.update(PREFIX[1:])  # of no use without the first
    assert chosen(registry) == ("p1", "d2")
    assert chosen(registry, "least-loaded") == ("p0", "d0")


@pytest.mark.parametrize(("queued", "home"), [(59, "p1"), (61, "p0")])
def test_affinity_ends_where_waiting_takes_half_as_long_again_as_computing(
    registry: Registry, queued: int, home: str
) -> None:
    hold(registry, "p1", 10)
    queue(registry, "p1", queued)
    assert chosen(registry)[0] == home


def test_a_prefix_draws_no_more_sequences_than_balance_allows(registry: Registry) -> None:
    for decode in registry.serving("decode"):
        decode.report(WorkerLoad(max_num_seqs=64, free_blocks=999))
    hold(registry, "d1", 10)
    counts: Counter[str] = Counter()
    for number in range(18):
        name = chosen(registry)[1]
        registry.give(worker(registry, name), f"{number}", Assignment(1, 1, begun=True))
        counts[name] += 1
    assert counts["d1"] == max(counts.values())
    assert counts["d1"] <= SPREAD * 6 + SLACK
    assert min(counts.values()) >= 4


@pytest.mark.parametrize(("held", "home"), [(3, "d0"), (5, "d1")])
def test_of_idle_workers_only_one_that_holds_much_of_the_prompt_is_preferred(
    registry: Registry, held: int, home: str
) -> None:
    for decode in registry.serving("decode"):
        decode.report(WorkerLoad(max_num_seqs=64, free_blocks=999))
    hold(registry, "d1", held)  # of ten blocks
    assert chosen(registry)[1] == home


@pytest.mark.parametrize(("others", "home"), [(3, "d1"), (5, "d0")])
def test_a_chat_stays_with_its_kv_as_long_as_only_a_few_more_run_there(
    registry: Registry, others: int, home: str
) -> None:
    for decode in registry.serving("decode"):
        decode.report(WorkerLoad(max_num_seqs=64, free_blocks=999))
    hold(registry, "d1", 10)
    queue(registry, "d1", 1, count=others)
    assert chosen(registry)[1] == home


def test_a_worker_that_holds_the_prompt_takes_it_behind_as_many_tokens(registry: Registry) -> None:
    prefill = worker(registry, "p0")
    prefill.report(WorkerLoad(prefill_tokens_per_second=20.0))
    queue(registry, "p0", 10, count=3)  # 30 tokens, of which half a second computes 10
    assert not takes_prompt(prefill, DEMAND)
    hold(registry, "p0", 4)
    assert not takes_prompt(prefill, DEMAND)
    hold(registry, "p0", 10)
    assert takes_prompt(prefill, DEMAND)
    assert not takes_prompt(prefill, Demand(DEMAND.num_tokens, 60))


def test_a_decode_worker_that_computes_the_prompt_is_chosen_by_what_it_holds(
    registry: Registry,
) -> None:
    hold(registry, "d1", 5)
    decode = choose_decode(registry, DEMAND)
    assert decode is worker(registry, "d1")


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_workers_that_share_nothing_take_turns(registry: Registry, policy: PolicyName) -> None:
    counts: Counter[str] = Counter()
    for number in range(300):
        pair = choose_pair(registry, Demand(8, 16), policy=POLICIES[policy])
        assert pair is not None
        for chosen_worker in pair.workers:
            registry.give(chosen_worker, f"{number}", Assignment(8, 16, begun=True))
            chosen_worker.end(f"{number}")
            counts[chosen_worker.worker_id] += 1
    assert len(counts) == 6
    assert max(counts.values()) <= 1.25 * 100


def test_the_better_of_two_is_never_the_worst_of_all(registry: Registry) -> None:
    queue(registry, "p2", 50)
    for number in range(100):
        pair = choose_pair(registry, Demand(8, 16), policy=POLICIES["power-of-two"])
        assert pair is not None
        assert pair.prefill is not None
        assert pair.prefill.worker_id != "p2"
        registry.give(pair.decode, f"{number}", Assignment(8, 16, begun=True))
        pair.decode.end(f"{number}")
