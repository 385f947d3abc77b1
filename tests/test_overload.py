"""Overload: what cannot be served in time is turned away at once, and everything else is served."""

from __future__ import annotations

import time

import pytest

from protocol.errors import OverloadedError
from protocol.sampling import SamplingParams
from router.generation import GenerationRequest
from tests.overload_simulation import CAPACITY, SLOTS, Asked, Simulation, goodput

BOUND = 1.5  # seconds to the first token that a client accepts
SECONDS = 20.0
SAMPLING = SamplingParams(max_tokens=20)


def offered(load: float, seed: int) -> tuple[Simulation, list[Asked]]:
    simulation = Simulation()
    asked = simulation.offer(load * CAPACITY, SECONDS, seed)
    simulation.run(SECONDS)
    return simulation, asked


@pytest.mark.parametrize("seed", range(3))
def test_goodput_holds_at_three_times_the_capacity_and_recovers_after(seed: int) -> None:
    figures = {}
    for load in (0.5, 1.0, 2.0, 3.0):
        simulation, asked = offered(load, seed)
        figures[load] = goodput(asked, SECONDS, BOUND) / CAPACITY
        assert simulation.most_decoding <= SLOTS
    peak = max(figures.values())
    assert figures[0.5] > 0.4, figures
    assert peak > 0.8, figures
    assert figures[3.0] >= 0.8 * peak, figures
    simulation.run(10.0)  # it is over
    after = simulation.offer(0.5 * CAPACITY, SECONDS, seed)
    simulation.run(SECONDS)
    done = [a for a in after if a.arrived < simulation.now - 3.0]
    assert not [a.error for a in done if a.error]
    assert max(a.first_token - a.arrived for a in done if a.first_token) < BOUND
    assert simulation.scene.dispatcher.num_running <= SLOTS
    assert all(a.ended for a in asked)


def test_who_is_turned_away_hears_so_at_once_and_when_to_come_back() -> None:
    simulation, asked = offered(3.0, seed=1)
    shed = [a for a in asked if isinstance(a.error, OverloadedError)]
    assert len(shed) > 0.5 * len(asked)
    at_once = [a for a in shed if a.running is None]
    assert len(at_once) > 0.9 * len(shed)  # few were forecast to start and did not
    waits = [a.error.retry_after for a in at_once if isinstance(a.error, OverloadedError)]
    assert min(waits) > 0
    assert max(waits) < 2.0  # the queue is a second long
    assert simulation.scene.count("requests_shed", reason="forecast") == len(at_once)


def test_turning_away_takes_no_time_however_many_wait() -> None:
    simulation = Simulation(max_queue_time=1e9, max_num_requests=1000)
    for number in range(1000):
        simulation.scene.dispatch(GenerationRequest(f"r{number}", [1] * 80, SAMPLING))
    began = time.perf_counter()
    for number in range(1000, 1100):
        with pytest.raises(OverloadedError):
            simulation.scene.dispatch(GenerationRequest(f"r{number}", [1] * 80, SAMPLING))
    assert time.perf_counter() - began < 5.0  # 50 ms each


def test_ones_flood_does_not_starve_another() -> None:
    simulation = Simulation()
    flood = simulation.offer(5 * CAPACITY, SECONDS, 1, client="flood")
    calm = simulation.offer(0.125 * CAPACITY, SECONDS, 2, client="calm")
    simulation.run(SECONDS + 3.0)
    assert not [a.error for a in calm if a.error]
    assert all(a.first_token and a.first_token - a.arrived < BOUND for a in calm)
    served = [a for a in flood if not a.error]
    assert goodput(flood, SECONDS, 1e9) > 0.6 * CAPACITY  # what the other leaves
    assert len(served) < len(flood) / 2


def test_a_full_router_turns_the_greediest_away() -> None:
    simulation = Simulation(max_queue_time=1e9, max_num_requests=SLOTS + 10)
    flood = simulation.offer(20 * CAPACITY, 2.0, 1, client="flood")
    simulation.run(2.0)
    calm = simulation.offer(0.25 * CAPACITY, 5.0, 2, client="calm")
    more = simulation.offer(20 * CAPACITY, 5.0, 3, client="flood")
    simulation.run(8.0)
    assert all(a.ended and not a.error for a in calm)
    errors = [a.error for a in (*flood, *more) if a.error]
    assert errors
    assert all(isinstance(error, OverloadedError) for error in errors)
    pushed_out = simulation.scene.count("requests_shed", reason="pushed_out")
    assert 0 < pushed_out <= len(calm)
    assert simulation.scene.count("requests_shed", reason="full") == len(errors) - pushed_out
