"""The prefill scheduler: whose tokens are computed when, and who owns which blocks."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sequence import Sequence
from tests.prefill_scene import SAMPLING, Worker, expected

prompts = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 30)).map(lambda x: [x[0]] * x[1]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    prompts=prompts,
    budget=st.integers(1, 20),
    max_num_seqs=st.integers(1, 4),
    ask_ahead=st.integers(1, 40),
    num_blocks=st.integers(8, 30),
    seed=st.integers(0, 2**16),
)
def test_every_prompt_token_is_computed_once_in_order_within_the_budget(
    prompts: list[list[int]],
    budget: int,
    max_num_seqs: int,
    ask_ahead: int,
    num_blocks: int,
    seed: int,
) -> None:
    random = Random(seed)
    worker = Worker(num_blocks, budget, max_num_seqs, ask_ahead)
    sequences = [worker.add(str(i), prompt, grant=False) for i, prompt in enumerate(prompts)]
    for _ in range(500):
        for request_id in sorted(worker.offered - worker.granted):  # decode takes its time
            if random.random() < 0.5:
                worker.grant(request_id)
        worker.step()
        if random.random() < 0.5:  # so do hand-offs
            worker.release_finished()
        if len(worker.finished) == len(prompts):
            break
    worker.release_finished()
    worker.pool.check_integrity([])
    for request_id in worker.offered - worker.granted:
        worker.grant(request_id)
    assert worker.scheduler.waiting_tokens == 0
    assert not worker.scheduler._granted
    assert not worker.scheduler._ahead
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids == [*prompt, expected(prompt)]
        computed = worker.computed[sequence.request_id]
        assert computed == sorted(set(computed))
        assert len(computed) == len(prompt) - sequence.num_cached


@pytest.mark.parametrize("inside_step", [False, True])
def test_cancel_at_every_step_of_every_sequence(inside_step: bool) -> None:
    prompts = {"a": [1] * 19, "b": [2] * 8, "c": [1] * 13, "d": [4] * 3}
    for cancelled in prompts:
        for cancel_at in range(12):
            worker = Worker(num_blocks=9, budget=6, max_num_seqs=3)
            for request_id, prompt in prompts.items():
                worker.add(request_id, prompt)
            for index in range(40):
                batch = worker.schedule() if inside_step else None
                if index == cancel_at:
                    worker.cancel(cancelled)
                    worker.cancel(cancelled)
                worker.commit(batch or worker.schedule())
                worker.release_finished()
            for request_id in prompts.keys() - {cancelled}:
                assert worker.finished[request_id].token_ids[-1] == expected(prompts[request_id])
            assert worker.pool.num_used == 0
            assert not worker.scheduler._granted
            assert not worker.scheduler.running


def test_a_cancelled_sequences_blocks_are_fenced_until_its_step_ends() -> None:
    worker = Worker(num_blocks=2)
    worker.add("a", [1] * 8)
    batch = worker.schedule()
    worker.scheduler.cancel("a")
    worker.add("b", [2] * 8)
    assert list(worker.scheduler.prompts_to_offer()) == []
    assert not worker.scheduler.running  # b cannot have a's blocks yet
    worker.commit(batch)
    assert worker.pool.num_used == 0
    worker.step()
    assert worker.finished["b"].token_ids[-1] == expected([2] * 8)


def test_a_request_id_may_come_again_while_its_cancelled_namesake_is_in_the_step() -> None:
    worker = Worker()
    worker.add("a", [1] * 8)
    batch = worker.schedule()
    worker.scheduler.cancel("a")
    again = worker.add("a", [2] * 4)
    worker.commit(batch)
    assert "a" not in worker.finished
    worker.step()
    assert worker.finished["a"] is again
    assert again.token_ids[-1] == expected([2] * 4)


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    worker = Worker(num_blocks=400, budget=8)
    worker.add("long", [1] * 1000)
    for step in range(20):
        worker.add(f"short {step}", [2 + step] * 4)
        worker.step()
        assert f"short {step}" in worker.finished
    worker.release_finished()


@pytest.mark.parametrize("budget", [1, 2, 8])
def test_short_prompts_do_not_hold_up_a_long_one(budget: int) -> None:
    worker = Worker(num_blocks=400, budget=budget)
    worker.add("long", [1] * 100)
    for step in range(1000):
        worker.add(f"short {step}", [2 + step] * budget)  # enough to fill every budget
        worker.step()
        worker.release_finished()
        if "long" in worker.finished:
            break
    assert step <= 100 // -(-budget // 2) + 1


def test_at_least_one_token_is_computed_even_if_all_are_cached() -> None:
    worker = Worker()
    worker.add("a", [1] * 8)
    worker.step()
    worker.release_finished()
    again = worker.add("b", [1] * 8)
    worker.step()
    assert again.num_cached == 4
    assert again.token_ids[-1] == expected([1] * 8)


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole() -> None:
    worker = Worker(num_blocks=8)
    prompt = [1] * 9
    for wanted, cached in ((None, 0), (1, 0), (None, 8)):
        sequence = worker.add(f"{wanted}-{cached}", prompt)
        sequence.sampling = SAMPLING.model_copy(update={"prompt_logprobs": wanted})
        while sequence.request_id not in worker.finished:
            worker.step()
        assert sequence.num_cached == cached
        worker.release_finished()


def test_a_prompt_that_may_not_start_yet_is_passed_over_and_keeps_its_turn() -> None:
    worker = Worker(num_blocks=6)
    late = {"a"}
    worker.scheduler.may_start = lambda sequence: sequence.request_id not in late
    for request_id in ("a", "b", "c", "d"):
        worker.add(request_id, [ord(request_id)] * 8)
    worker.step()
    assert [s.request_id for s in worker.scheduler.waiting] == ["a"]
    late.clear()
    worker.add("e", [5] * 24)  # all of the pool: nobody passes over it
    worker.add("f", [6] * 4)
    for _ in range(9):
        worker.step()
        worker.release_finished()
    assert list(worker.finished) == ["b", "c", "d", "a", "e", "f"]


def test_prompts_that_begin_alike_are_computed_once_though_they_come_at_once() -> None:
    """Every step but the last is the first one's alone; the others compute what is their own."""
    worker = Worker(budget=8, ask_ahead=100)
    common = [1, 2, 3, 4] * 6
    prompts = {name: [*common, ord(name), 9] for name in "abc"}
    for name, prompt in prompts.items():
        worker.add(name, prompt)
    while len(worker.finished) < len(prompts):
        worker.step()
    assert worker.computed == {
        "a": [*range(26)],
        "b": [24, 25],
        "c": [24, 25],
    }
    for name, prompt in prompts.items():
        assert worker.finished[name].num_cached == (0 if name == "a" else len(common))
        assert worker.finished[name].token_ids[-1] == expected(prompt)
    worker.release_finished()


def test_the_next_goes_on_behind_what_a_cancelled_prompt_had_computed() -> None:
    worker = Worker(budget=8, ask_ahead=100)
    prompt = [1, 2, 3, 4] * 6
    worker.add("gone", prompt)
    worker.add("other", prompt)
    worker.step()
    batch = worker.schedule()
    worker.cancel("gone")
    worker.commit(batch)
    while "other" not in worker.finished:
        worker.step()
    assert worker.computed["other"] == [*range(8, 24)]
    assert worker.finished["other"].token_ids[-1] == expected(prompt)
    worker.release_finished()


def test_the_lowest_priority_number_starts_first_and_what_runs_is_not_stopped() -> None:
    worker = Worker(budget=8, max_num_seqs=1)
    worker.add("running", [1] * 20)
    worker.step()
    for name, priority in (("bulk", 5), ("usual", 0), ("urgent", -3), ("urgent too", -3)):
        sequence = Sequence(name, [ord(name[0]) + len(name)] * 8, 8, SAMPLING, priority=priority)
        worker.scheduler.add(sequence)
        worker.grant(name)
    for _ in range(8):
        worker.step()
        worker.release_finished()
    assert [*worker.finished] == ["running", "urgent", "urgent too", "usual", "bulk"]
