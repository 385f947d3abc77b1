"""What a worker can still take, and what the router forecasts of a request's wait."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from protocol.messages import WorkerLoad
from router.capacity import (
    Demand,
    free_blocks,
    held_sequences,
    queued_tokens,
    takes_prompt,
    takes_sequence,
)
from router.forecast import FIRST_GUESS, Forecast
from router.registry import Assignment, Worker
from tests.router_scene import registration

BLOCK = 4  # tokens, as in the scene


def worker(name: str, load: WorkerLoad, *given: Assignment) -> Worker:
    made = Worker(name.encode(), registration(name), last_seen=0.0)
    made.report(load)
    for number, assignment in enumerate(given):
        made.give(str(number), assignment)
    return made


def prompt(num_tokens: int) -> Assignment:
    return Assignment(num_tokens, num_tokens, begun=True, prompt_tokens=num_tokens)


def test_what_a_worker_was_given_is_summed_up_right_whatever_happens_to_it() -> None:
    rng = random.Random(1)
    made = worker("d", WorkerLoad())
    for number in range(500):
        held = list(made.assigned)
        match rng.randrange(4):
            case 0:
                expected, computes = rng.randrange(1, 50), rng.choice([0, 7])
                made.give(str(number), Assignment(7, expected, rng.random() < 0.5, computes))
            case 1 if held:
                made.goes_on(rng.choice(held), 7 + rng.randrange(60))
            case 2 if held:
                made.end(rng.choice(held))
            case 3:
                made.report(WorkerLoad(free_blocks=number))
        given = made.assigned.values()
        assert made.num_prompts == sum(a.prompt_tokens > 0 for a in given)
        assert made.assigned_tokens == sum(a.prompt_tokens for a in given)
        assert made.unreported_tokens == sum(a.prompt_tokens for a in given if not a.reported)
        assert made.promised_blocks == sum(a.coming_blocks for a in given)


def test_what_was_dispatched_counts_before_any_report() -> None:
    load = WorkerLoad(waiting_tokens=0)
    prefill = worker("p", load, prompt(30), prompt(12))
    assert queued_tokens(prefill) == 42


def test_a_report_tells_how_far_a_prompt_has_come() -> None:
    prefill = worker("p", WorkerLoad(), prompt(1000))
    prefill.report(WorkerLoad(waiting_tokens=300))
    assert queued_tokens(prefill) == 300
    prefill.give("new", prompt(50))
    assert queued_tokens(prefill) == 350


def test_a_prompt_that_a_report_crosses_on_its_way_counts_beside_it() -> None:
    prefill = worker("p", WorkerLoad())
    for number, num_tokens in ((1, 30), (2, 12)):
        prefill.give(str(number), replace(prompt(num_tokens), number=number))
    prefill.report(WorkerLoad(waiting_tokens=30 + 500), num_received=1)
    assert queued_tokens(prefill) == 30 + 500 + 12
    prefill.report(WorkerLoad(waiting_tokens=25 + 12 + 500), num_received=2)
    assert queued_tokens(prefill) == 25 + 12 + 500


def test_what_has_ended_counts_no_more_whatever_the_last_report_said() -> None:
    prefill = worker("p", WorkerLoad(), prompt(1000), prompt(20))
    prefill.report(WorkerLoad(waiting_tokens=900))
    prefill.end("0")
    assert queued_tokens(prefill) == 20


def test_other_routers_work_shows_in_reports() -> None:
    prefill = worker("p", WorkerLoad())
    prefill.report(WorkerLoad(waiting_tokens=500))
    prefill.give("mine", prompt(10))
    assert queued_tokens(prefill) == 510
    decode = worker("d", WorkerLoad())
    decode.report(WorkerLoad(num_running=1, num_promised=6))
    decode.give("mine", prompt(10))
    assert held_sequences(decode) == 7


@pytest.mark.parametrize(
    ("load", "queued"),
    [
        (WorkerLoad(waiting_tokens=100 + 800), 900),  # all have started: what is cached shows
        (WorkerLoad(waiting_tokens=1000 + 800, num_waiting=1), 900),  # ours has not
    ],
)
def test_a_cached_prompt_hides_nothing_that_other_routers_queued(
    load: WorkerLoad, queued: int
) -> None:
    prefill = worker("p", WorkerLoad(), Assignment(1000, 1000, begun=True, prompt_tokens=100))
    prefill.report(load)
    assert queued_tokens(prefill) == queued


@pytest.mark.parametrize(
    ("rate", "prompts", "takes"),
    [
        (0.0, [900, 900, 900], True),  # nothing measured yet
        (1000.0, [900], True),  # a short prompt shares the steps with a long one
        (1000.0, [200, 200], True),
        (1000.0, [300, 300], False),
        (10_000.0, [300, 300], True),
    ],
)
def test_a_prefill_worker_is_given_half_a_second_of_work_in_advance(
    rate: float, prompts: list[int], takes: bool
) -> None:
    load = WorkerLoad(prefill_tokens_per_second=rate)
    assert takes_prompt(worker("p", load, *map(prompt, prompts)), Demand(1, 2)) == takes


def test_decodes_blocks_are_promised_at_dispatch_and_not_counted_twice() -> None:
    load = WorkerLoad(max_num_seqs=8, free_blocks=20, total_blocks=20)
    held = Assignment(2 * BLOCK, 6 * BLOCK, begun=False)
    decode = worker("d", load, held)
    assert free_blocks(decode) == 14
    decode.report(load)  # it says nothing of what waits for its prefill
    assert free_blocks(decode) == 14
    held.begun, held.num_tokens = True, 3 * BLOCK
    decode.report(load.model_copy(update={"free_blocks": 17}))
    assert free_blocks(decode) == 14  # three taken, three to come
    held.num_tokens = 9 * BLOCK  # longer than expected
    decode.report(load.model_copy(update={"free_blocks": 11}))
    assert free_blocks(decode) == 11


def test_an_ended_sequences_blocks_are_free_at_once() -> None:
    load = WorkerLoad(max_num_seqs=8, num_promised=2, free_blocks=5, total_blocks=20)
    decode = worker("d", load, *(Assignment(5 * BLOCK, 5 * BLOCK, begun=True) for _ in range(2)))
    decode.report(load)
    decode.end("0")
    decode.end("unknown")
    assert free_blocks(decode) == 10
    decode.report(load.model_copy(update={"free_blocks": 11}))
    assert free_blocks(decode) == 11


def test_blocks_that_sequences_share_are_free_for_others() -> None:
    load = WorkerLoad(max_num_seqs=8, num_promised=2, free_blocks=15, total_blocks=20)
    decode = worker("d", load, *(Assignment(5 * BLOCK, 5 * BLOCK, begun=True) for _ in range(2)))
    decode.report(load)
    assert free_blocks(decode) == 15


def test_a_sequence_needs_a_slot_and_blocks_unless_it_is_alone() -> None:
    load = WorkerLoad(max_num_seqs=2, free_blocks=4, total_blocks=4)
    small, large = Demand(BLOCK, 2 * BLOCK), Demand(BLOCK, 9 * BLOCK)
    other = Assignment(BLOCK, 2 * BLOCK, begun=False)
    assert takes_sequence(worker("d", load), large)
    assert takes_sequence(worker("d", load, other), small)
    assert not takes_sequence(worker("d", load, other), large)
    assert not takes_sequence(worker("d", load, other, other), small)


def test_outputs_are_expected_to_be_as_long_as_those_before() -> None:
    forecast = Forecast()
    assert forecast.output(10_000) == FIRST_GUESS
    assert forecast.output(7) == 7
    for _ in range(200):
        forecast.ended(num_output=40, seconds=2.0)
    assert forecast.output(10_000) == 40


def test_the_wait_is_the_longer_of_prefills_and_of_the_places() -> None:
    forecast = Forecast()
    nothing = forecast.wait(num_ahead=9, num_running=4, tokens_ahead=900, prefill_rate=0.0)
    assert nothing == 0.0
    forecast.ended(num_output=40, seconds=2.0)
    places = forecast.wait(num_ahead=9, num_running=4, tokens_ahead=100, prefill_rate=100.0)
    assert places == 10 * 2.0 / 4
    prefill = forecast.wait(num_ahead=9, num_running=4, tokens_ahead=900, prefill_rate=100.0)
    assert prefill == 9.0
