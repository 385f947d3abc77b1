"""The simulator against hand-computed runs, queueing theory and its own slower self."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.block_pool import BlockPool
from planner import simulator
from planner.job import Job
from planner.outcome import Slo
from planner.placement import Placement
from planner.profile import PUBLISHED, WorkerProfile
from planner.routing import LeastLoaded
from planner.simulator import Detail, simulate
from planner.workload import Lengths, Request, generate
from protocol.errors import ConfigError
from tests.planner.profiles import profile

DETAILS: tuple[Detail, ...] = ("exact", "fast")
PAIR = Placement(prefill=1, decode=1)
TIGHT = Slo(1.0, 1.0)
H200 = PUBLISHED["h200-llama-3.1-8b"]


@pytest.fixture(params=DETAILS)
def detail(request: pytest.FixtureRequest) -> Detail:
    value: Detail = request.param
    return value


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BlockPool]]:
    """Every block pool of the test's simulations; none may have an owner at the end."""
    made: list[BlockPool] = []

    def make(num_blocks: int, block_size: int) -> BlockPool:
        made.append(BlockPool(num_blocks, block_size))
        return made[-1]

    monkeypatch.setattr(simulator, "BlockPool", make)
    yield made
    assert made
    for pool in made:
        pool.check_integrity([])


@pytest.mark.usefixtures("pools")
def test_one_request_by_hand(detail: Detail) -> None:
    """Chunks of 256 and 44 tokens; 300 bytes at 1 kB/s from the first chunk's end; four steps."""
    slow = profile(fixed=5e-3, bytes_per_second=1e3, kv_bytes_per_token=1, link_latency=0.5)
    placement = Placement(prefill=1, decode=1, max_num_batched_tokens=256)
    outcome = simulate([Request(3.0, 300, 5)], placement, slow, detail=detail)
    ttft = 2 * 5e-3 + 0.300
    ready = (5e-3 + 0.256) + 0.300 + 0.5
    assert outcome.ttft == pytest.approx([ttft])
    assert outcome.tpot == pytest.approx([(ready - ttft) / 4 + 10e-3])


@pytest.mark.usefixtures("pools")
def test_overhead_precedes_the_queue_of_each_request(detail: Detail) -> None:
    """The second prompt comes to the worker while the first one's 100 ms still run."""
    hasty = profile(fixed=0.0).model_copy(update={"overhead": 0.25})
    two = [Request(0.0, 100, 1), Request(0.05, 100, 1)]
    assert simulate(two, PAIR, hasty, detail=detail).ttft == pytest.approx([0.35, 0.40])


@pytest.mark.usefixtures("pools")
def test_one_colocated_request_by_hand(detail: Detail) -> None:
    by_context = profile(decode=(10e-3, 1e-3, 1e-4))
    outcome = simulate([Request(0.0, 100, 10)], Placement(colocated=1), by_context, detail=detail)
    assert outcome.ttft == pytest.approx([0.100])
    assert outcome.tpot == pytest.approx([10e-3 + 1e-4 + 1e-3 * (101 + 109) / 2])


@pytest.mark.usefixtures("pools")
def test_a_colocated_prompt_slows_the_tokens_beside_it(detail: Detail) -> None:
    """The second prompt's 400 tokens take two chunks of 256 less the row that decodes."""
    requests = [Request(0.0, 100, 41), Request(0.2, 400, 1)]
    placement = Placement(colocated=1, max_num_batched_tokens=256)
    outcome = simulate(requests, placement, profile(), detail=detail)
    second, first = outcome.tpot
    assert second == 0.0
    assert first == pytest.approx((38 * 10e-3 + 0.400) / 40)
    assert outcome.itl.percentile(100) == pytest.approx(0.255, rel=0.02)


@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize("placement", [PAIR, Placement(colocated=1)])
@pytest.mark.parametrize("full", ["slots", "KV"])
def test_who_finds_no_place_in_decode_waits_before_its_prompt(
    placement: Placement, full: str, detail: Detail
) -> None:
    """The first request ends after 100 ms and ten steps of 10 ms; the wait is the second's TTFT."""
    two = [Request(0.0, 100, 11), Request(0.05, 100, 11)]
    small = replace(placement, max_num_seqs=1 if full == "slots" else 8)
    worker = profile(kv_tokens=192 if full == "KV" else 1024)  # three blocks; each needs two
    outcome = simulate(two, small, worker, detail=detail)
    assert outcome.ttft == pytest.approx([0.100, 0.2 - 0.05 + 0.100])
    assert outcome.tpot == pytest.approx([10e-3, 10e-3])


OWN_PROMPTS = Placement(prefill=1, decode=1, local_prefill_tokens=100)


@pytest.mark.usefixtures("pools")
def test_decode_computes_a_short_prompt_without_a_transfer(detail: Detail) -> None:
    slow_link = profile(link_latency=9.0)
    requests = [Request(0.0, 100, 11), Request(5.0, 101, 11)]
    outcome = simulate(requests, OWN_PROMPTS, slow_link, detail=detail)
    assert outcome.ttft == pytest.approx([0.100, 0.101])
    assert outcome.tpot == pytest.approx([10e-3, 10e-3 + 9.0 / 10])


@pytest.mark.usefixtures("pools")
def test_decode_has_one_prompt_of_its_own_at_a_time(detail: Detail) -> None:
    requests = [Request(0.0, 100, 2), Request(0.01, 80, 2), Request(0.02, 60, 2)]
    outcome = simulate(requests, OWN_PROMPTS, profile(), detail=detail)
    assert sorted(outcome.ttft) == pytest.approx([0.08, 0.100, 0.08 + 0.06 - 0.01])


@pytest.mark.usefixtures("pools")
def test_a_decode_worker_that_is_half_full_has_none(detail: Detail) -> None:
    placement = Placement(prefill=1, decode=1, max_num_seqs=4, local_prefill_tokens=100)
    requests = [Request(0.0, 200, 99), Request(0.01, 150, 99), Request(0.9, 50, 2)]
    outcome = simulate(requests, placement, profile(link_latency=0.3), detail=detail)
    assert outcome.ttft[0] == pytest.approx(0.05)
    assert outcome.tpot[0] > 0.3, "it was handed over"


def test_a_colocated_worker_has_no_prompts_but_its_own() -> None:
    with pytest.raises(ConfigError, match="only a decode worker of two pools"):
        Placement(colocated=1, local_prefill_tokens=1)
    assert OWN_PROMPTS.with_pools(0, 2) == Placement(colocated=2)
    assert OWN_PROMPTS.with_pools(2, 1).local_prefill_tokens == 100


@pytest.mark.usefixtures("pools")
def test_the_last_token_of_a_single_one_is_its_first(detail: Detail) -> None:
    outcome = simulate([Request(0.0, 100, 1)], PAIR, profile(link_latency=9.0), detail=detail)
    assert (outcome.ttft[0], outcome.tpot[0]) == (pytest.approx(0.1), 0.0)


@pytest.mark.usefixtures("pools")
def test_a_known_prefix_is_not_computed_again(detail: Detail) -> None:
    requests = [Request(0.0, 1100, 2, (7, 8, 1)), Request(9.0, 1100, 2, (7, 8, 2))]
    outcome = simulate(requests, PAIR, profile(), detail=detail)
    assert outcome.ttft == pytest.approx([1.1, 1.1 - 1.024])
    assert outcome.cached_tokens == 1024


def test_what_fits_no_worker_is_rejected(detail: Detail) -> None:
    small = profile(kv_tokens=640)
    requests = [Request(0.0, 600, 100), Request(0.0, 600, 10)]
    outcome = simulate(requests, PAIR, small, detail=detail)
    assert (len(outcome.ttft), outcome.num_rejected) == (1, 1)


def test_a_run_ends_when_it_is_given_up(detail: Detail) -> None:
    requests = list(generate(rate=50, count=200, prompt=Lengths(300), output=Lengths(2)))
    outcome = simulate(
        requests, PAIR, profile(), detail=detail, give_up=lambda seen: seen.num_missed(TIGHT) > 20
    )
    assert 20 < outcome.num_missed(TIGHT) <= 20 + simulator.LOOK_EVERY
    assert outcome.num_requests < len(requests)


def test_a_worker_without_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not hold one block"):
        simulate([], PAIR, profile(kv_tokens=63))


@pytest.mark.parametrize(
    "counts",
    [{}, {"prefill": 1}, {"decode": 1}, {"prefill": 1, "decode": 1, "colocated": 1}],
)
def test_half_a_placement_is_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a prefill and a decode worker, or only colocated"):
        Placement(**counts)


@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize(
    "placement",
    [
        Placement(prefill=2, decode=2),
        Placement(prefill=2, decode=2, local_prefill_tokens=300),
        Placement(colocated=3),
    ],
)
def test_scarce_kv_delays_but_loses_nothing(placement: Placement, detail: Detail) -> None:
    requests = list(
        generate(rate=50, count=300, prompt=Lengths(300, 1.0), output=Lengths(150, 1.0))
    )
    scarce, ample = profile(kv_tokens=4096), profile()
    short = simulate(requests, placement, scarce, detail=detail)
    enough = simulate(requests, placement, ample, detail=detail)
    assert len(short.ttft) + short.num_rejected == len(enough.ttft) == 300
    assert short.figures()["ttft_p90"] > enough.figures()["ttft_p90"]


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_lone_prefill_worker_is_the_queue_of_the_books(load: float) -> None:
    """M/D/1: mean wait = load · service / (2 · (1 - load)) (Pollaczek-Khinchine)."""
    service = 16e-3
    one_at_a_time = Placement(prefill=1, decode=1, max_num_seqs=4, block_size=16)
    arrivals = generate(rate=load / service, count=60_000, prompt=Lengths(16), output=Lengths(1))
    outcome = simulate(arrivals, one_at_a_time, profile(kv_tokens=1024))
    wait = outcome.ttft.mean() - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.03)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(prefill=2, decode=1),
        Placement(prefill=2, decode=1, local_prefill_tokens=1000),
        Placement(colocated=3, max_num_batched_tokens=512),
    ],
)
@pytest.mark.parametrize("rate", [15, 45])
def test_leaps_land_where_the_real_schedulers_do(placement: Placement, rate: float) -> None:
    requests = list(
        generate(rate=rate, count=500, prompt=Lengths(1100, 1.0), output=Lengths(120, 1.0))
    )
    exact, fast = (simulate(requests, placement, H200, detail=detail) for detail in DETAILS)
    for name, value in exact.figures().items():
        if not name.endswith("p99"):
            assert fast.figures()[name] == pytest.approx(value, rel=0.05), name


def test_arrivals_are_read_as_they_come() -> None:
    """Memory holds the requests in flight, not the workload."""
    under_way, most = 0, 0

    def arrivals() -> Iterator[Request]:
        nonlocal under_way, most
        for request in generate(rate=20, count=2000, prompt=Lengths(16), output=Lengths(2)):
            under_way += 1
            most = max(most, under_way)
            yield request

    class Counting(LeastLoaded):
        def ended(self, job: Job) -> None:
            nonlocal under_way
            super().ended(job)
            under_way -= 1

    simulate(arrivals(), PAIR, profile(), route=Counting)
    assert under_way == 0
    assert most < 30


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_profile_survives_its_file(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("profile") / "worker.json"
    path.write_text(PUBLISHED[name].model_dump_json())
    assert WorkerProfile.load(str(path)) == WorkerProfile.load(name)


def test_a_broken_profile_is_refused_by_its_field(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("profile") / "worker.json"
    path.write_text(H200.model_dump_json().replace('"kv_tokens":850000', '"kv_tokens":0'))
    with pytest.raises(ConfigError, match="kv_tokens"):
        WorkerProfile.load(str(path))
    with pytest.raises(ConfigError, match="neither a readable file nor one of"):
        WorkerProfile.load("no-such-profile")


def test_itl_percentiles_are_within_a_bucket() -> None:
    intervals = np.random.default_rng(0).lognormal(-4, 1, 10_000)
    histogram = simulator.Outcome().itl
    for interval in intervals:
        histogram.add(interval)
    for percent in (1, 50, 90, 99):
        exact = np.percentile(intervals, percent)
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.02)
