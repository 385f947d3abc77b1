"""The step that prefill takes ahead of a grant, and who waits for what meanwhile."""

from __future__ import annotations

import pytest

from tests.prefill_scene import SAMPLING, Worker, expected


def test_one_step_goes_ahead_of_a_grant_and_others_go_on() -> None:
    worker = Worker(budget=8, ask_ahead=20)
    stuck = worker.add("stuck", [1] * 24, grant=False)
    worker.add("other", [2] * 20)
    computed = []
    for _ in range(10):
        worker.step()
        computed.append(stuck.num_computed)
    assert computed[:2] == [4, 8]  # until the grant is asked for, then ahead of it, by half a step
    assert computed[-1] == 8
    assert "other" in worker.finished
    assert not worker.scheduler.schedule().rows
    assert list(worker.scheduler.prompts_to_offer()) == [stuck]
    worker.grant("stuck")
    assert list(worker.scheduler.prompts_to_offer()) == []
    worker.scheduler.commit([])
    worker.step()
    worker.step()
    assert "stuck" in worker.finished


def test_while_a_grant_is_awaited_no_other_prompt_gets_ahead_of_its_own() -> None:
    worker = Worker(budget=8, ask_ahead=100)
    worker.add("early", [1] * 6, grant=False)
    worker.step()
    assert "early" in worker.finished  # before its grant
    late = worker.add("late", [2] * 6, grant=False)
    assert not worker.step().rows
    worker.grant("early")
    worker.step()
    assert "late" in worker.finished
    worker.add("third", [3] * 6, grant=False)
    assert not worker.step().rows
    worker.cancel(late.request_id)  # decode refused it
    worker.step()
    assert "third" in worker.finished
    assert not worker.scheduler._granted


def test_a_prompt_that_ends_with_its_first_token_keeps_nobody_waiting_for_its_grant() -> None:
    worker = Worker(budget=8, ask_ahead=100)
    stop = SAMPLING.model_copy(update={"stop_token_ids": (expected([1] * 6),)})
    worker.add("stops", [1] * 6, grant=False).sampling = stop
    worker.step()
    worker.add("next", [2] * 6, grant=False)
    worker.step()
    assert list(worker.finished) == ["stops", "next"]


def test_nobody_waits_for_a_prompt_of_the_same_beginning_that_has_no_grant() -> None:
    worker = Worker(budget=8, ask_ahead=100)
    worker.add("ahead", [9] * 4, grant=False)
    worker.step()  # from now on none may be ahead of its grant
    prompt = [1, 2, 3, 4] * 6
    worker.add("stuck", prompt, grant=False)
    worker.add("other", prompt)
    while "other" not in worker.finished:
        assert worker.step().rows
    assert worker.computed["other"] == [*range(24)]
    worker.grant("stuck")
    worker.step()
    assert worker.computed["stuck"] == [20, 21, 22, 23]
    worker.release_finished()


def test_a_budget_that_asks_for_no_grant_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Worker(ask_ahead=0)
