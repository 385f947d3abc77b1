"""The latency model from what running workers tell of their steps."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from engine.step_sums import StepTimes
from planner.fit import observed_profile
from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.observed import Row
from planner.profile import Link
from protocol.errors import ConfigError
from protocol.messages import WorkerLoad
from tests.planner.profiles import batch, timed

LATENCY = LinearLatency(
    prefill=PrefillFit(fixed=2e-3, per_token=1e-5, per_square=1e-9),
    decode=DecodeFit(fixed=5e-3, per_context=3e-8, per_row=1e-5),
)


def row(times: StepTimes, total_blocks: int = 100) -> dict[str, Any]:
    load = WorkerLoad(
        total_blocks=total_blocks, prefill_steps=times.prefill, decode_steps=times.decode
    )
    return {"block_size": 16, "block_wire_bytes": 32768, "load": load.model_dump()}


def test_two_workers_together_give_the_model_that_made_their_steps() -> None:
    workers = [row(timed("prefill", LATENCY, 60)), row(timed("decode", LATENCY, 600), 90)]
    found = observed_profile(workers)
    assert isinstance(found.latency, LinearLatency)
    assert found.latency.prefill_variation == pytest.approx(0.0, abs=1e-6)
    assert found.latency.decode_variation == pytest.approx(0.0, abs=1e-6)
    assert found.latency.prefill.model_dump() == pytest.approx(
        LATENCY.prefill.model_dump(), rel=1e-4
    )
    assert found.latency.decode.model_dump() == pytest.approx(LATENCY.decode.model_dump(), rel=1e-4)
    assert (found.kv_tokens, found.kv_bytes_per_token) == (1440, 2048)


def test_requests_tell_their_overhead_and_the_links_latencies() -> None:
    """A transfer's last chunk is of 300, 512 and 100 tokens; what it takes is no latency."""
    workers = [row(timed(role, LATENCY, 60)) for role in ("prefill", "decode")]
    for worker in workers:
        worker["load"]["max_num_batched_tokens"] = 512
    link = Link(bytes_per_second=1e8, latency=9.0)
    rows = [
        Row(0.0, 300, 9, 0, 0.1, 0.01, overhead=0.004, transfer=0.003 + 300 * 2048 / 1e8),
        Row(1.0, 900, 9, 100, 0.1, 0.01, overhead=0.005, transfer=0.002 + 512 * 2048 / 1e8),
        Row(2.0, 900, 9, 800, 0.1, 0.01, overhead=0.009, transfer=0.500 + 100 * 2048 / 1e8),
    ] * 8 + [Row(3.0, 100, 9, 0, 0.1, 0.01)]  # decode computed the last one
    found = observed_profile(workers, rows, link)
    assert found.overhead == pytest.approx(0.005)
    assert found.link.bytes_per_second == 1e8
    delays = sorted(found.link.delay(transfer) for transfer in range(31))
    assert delays[:8] == pytest.approx([0.002] * 8)
    assert delays[15] == pytest.approx(0.003)
    assert delays[-8:] == pytest.approx([0.5] * 8)
    unknown = observed_profile(workers, rows[-1:], link)
    assert (unknown.overhead, unknown.link) == (0.0, link)


def test_noisy_steps_still_predict() -> None:
    workers = [row(timed(role, LATENCY, 500, noise=0.2)) for role in ("prefill", "decode")]
    found = observed_profile(workers).latency
    for work in ((1000, 10**6, 0, 0), (0, 0, 20, 10_000)):
        assert found.step_seconds(*work) == pytest.approx(LATENCY.step_seconds(*work), rel=0.1)


def test_a_fit_is_of_the_mean_not_of_the_quickest_steps() -> None:
    random, times = Random(3), timed("prefill", LATENCY, 60)
    for _ in range(2000):
        times.add(batch((499, 1)), random.choice([5e-3, 5e-3, 5e-3, 45e-3]))
    found = observed_profile([row(times)]).latency
    assert found.step_seconds(0, 0, 1, 500) == pytest.approx(15e-3, rel=0.15)


def test_first_steps_and_stalls_hardly_count() -> None:
    times = StepTimes()
    for _ in range(5):
        times.add(batch((0, 512)), 2.0)  # allocates and compiles
    for number in range(100):
        times.add(batch((0, 512)), 5.0 if number == 50 else 8e-3)
        times.add(batch((99, 1)), 6e-3)
    found = observed_profile([row(times)]).latency
    assert found.step_seconds(512, 512**2, 0, 0) == pytest.approx(8e-3, rel=0.1)


def test_steps_all_alike_predict_themselves() -> None:
    times = StepTimes()
    for _ in range(50):
        times.add(batch((0, 512)), 8e-3)
        times.add(batch((99, 1), (99, 1)), 6e-3)
    found = observed_profile([row(times)]).latency
    assert found.step_seconds(512, 512**2, 0, 0) == pytest.approx(8e-3, rel=1e-3)
    assert found.step_seconds(0, 0, 2, 200) == pytest.approx(6e-3, rel=1e-3)


def test_a_worker_that_became_slower_is_learned_anew() -> None:
    slower = LATENCY.model_copy(
        update={"decode": DecodeFit(fixed=50e-3, per_context=3e-8, per_row=1e-5)}
    )
    times = timed("decode", LATENCY, 1000)
    random = Random(1)
    for _ in range(12_000):
        context = random.randrange(100, 900)
        times.add(batch((context - 1, 1)), slower.step_seconds(0, 0, 1, context))
    found = observed_profile([row(timed("prefill", LATENCY, 60)), row(times)]).latency
    assert found.step_seconds(0, 0, 1, 500) == pytest.approx(
        slower.step_seconds(0, 0, 1, 500), rel=0.3
    )


def test_what_the_fit_leaves_unexplained_is_variation() -> None:
    """Prefill steps take 0.7 or 1.3 times what is usual; decode's take 0.8 or 1.2, 32 in turn."""
    random, times = Random(4), StepTimes()
    for number in range(32_000):
        if number % 16 == 0:
            tokens = random.randrange(16, 2000)
            mean = LATENCY.step_seconds(tokens, tokens**2, 0, 0)
            times.add(batch((0, tokens)), mean * random.choice([0.7, 1.3]))
        if (number - 5) % 32 == 0:  # the first five are left out
            slow = random.choice([0.8, 1.2])
        took = LATENCY.step_seconds(0, 0, 1, 500) * (1.0 if number < 5 else slow)
        times.add(batch((499, 1)), took * random.uniform(0.5, 1.5))  # cancels out in a spell
    found = observed_profile([row(times)]).latency
    assert found.prefill_variation == pytest.approx(0.3, rel=0.1)
    assert found.decode_variation == pytest.approx(0.2, rel=0.15)


def test_mixed_steps_are_left_out() -> None:
    times = StepTimes()
    times.add(batch((0, 100), (50, 1)), 1.0)
    assert (times.prefill.count, times.decode.count) == (0, 0)


def test_too_few_steps_are_said_in_plain_words() -> None:
    workers = [row(timed("prefill", LATENCY, 60)), row(timed("decode", LATENCY, 36))]
    with pytest.raises(ConfigError, match=r"timed 0 decode steps: a latency model needs 20"):
        observed_profile(workers)
    with pytest.raises(ConfigError, match="no worker"):
        observed_profile([])
