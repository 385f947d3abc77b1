"""The decode scheduler under a model that can be computed by hand; audited after every step."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.scheduler import DecodeScheduler
from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.sampling import SamplingParams, TokenLogprobs
from tests.fake_model import Memory, generate, kv_of

BLOCK_SIZE = 2


class Worker:
    """A scheduler, its pool and an engine."""

    def __init__(self, num_blocks: int = 64, budget: int = 8, max_num_seqs: int = 8) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.memory = Memory(num_blocks, BLOCK_SIZE)
        self.scheduler = DecodeScheduler(
            self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        self.waiting: list[Sequence] = []  # whose prompts' blocks do not fit yet
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.own: set[str] = set()  # whose prompts decode computes itself
        self.cancelled: set[str] = set()

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        own: bool = False,
        priority: int = 0,
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens)
        sequence = Sequence(request_id, list(prompt), len(prompt), sampling, priority=priority)
        self.waiting.append(sequence)
        if own:
            self.own.add(request_id)
        return sequence

    def admit(self) -> None:
        """Let in what the pool has room for, as the admission does."""
        while self.waiting:
            sequence, headroom = self.waiting[0], self.scheduler.headroom
            own = sequence.request_id in self.own
            cacheable = sequence.num_cacheable if own else sequence.num_tokens
            if headroom is None or not self.pool.reserve(sequence, cacheable, headroom):
                return
            if own:
                self.outputs[sequence.request_id] = []
                self.scheduler.add(self.waiting.pop(0))
                continue
            kv = kv_of(sequence.token_ids)
            for position in range(sequence.num_computed, len(kv)):
                block = sequence.block_table[position // BLOCK_SIZE]
                self.memory.rows[block][position % BLOCK_SIZE] = kv[position]
            sequence.num_computed = sequence.num_prompt_tokens
            self.pool.publish(sequence, 0)
            self.hand_off(self.waiting.pop(0))

    def hand_off(self, sequence: Sequence) -> None:
        """Give a sequence to the scheduler with its first token."""
        first = generate(sequence.token_ids, SamplingParams(max_tokens=1))
        sequence.token_ids += first
        self.outputs[sequence.request_id] = first
        self.scheduler.add(sequence)

    def schedule(self) -> Batch:
        self.admit()
        batch = self.scheduler.schedule()
        assert len(batch.rows) <= self.scheduler.max_num_seqs
        chunks = sum(row.num_tokens for row in batch.rows if row.num_tokens > 1)
        budget = self.scheduler.max_num_batched_tokens
        assert chunks <= max(budget - sum(r.num_tokens == 1 for r in batch.rows), -(-budget // 2))
        assert self.cancelled.isdisjoint(row.sequence.request_id for row in batch.rows)
        for row in batch.rows:
            assert row.end <= len(row.sequence.block_table) * BLOCK_SIZE
        self.check()
        return batch

    def cancel(self, request_id: str) -> None:
        """No step that is scheduled from now on may run it."""
        self.cancelled.add(request_id)
        self.waiting = [s for s in self.waiting if s.request_id != request_id]
        self.scheduler.cancel(request_id)
        self.check()

    def commit(self, batch: Batch) -> None:
        for new in self.scheduler.commit(self.memory.run(batch)):
            self.outputs[new.sequence.request_id].append(new.token_id)
            if new.finish_reason is not None:
                assert new.finish_reason == "length"
                self.finished.add(new.sequence.request_id)
        self.check()

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left. No step may be empty before that: the worker would sleep."""
        for _ in range(max_steps):
            batch = self.schedule()
            if not batch.rows:
                break
            self.commit(batch)
        assert not self.waiting
        assert not self.scheduler.running
        assert not self.scheduler.num_waiting
        assert self.pool.num_used == 0

    def check(self) -> None:
        self.pool.check_integrity(self.scheduler.owned_blocks())


requests = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(1, 9), st.integers(2, 9), st.booleans(), st.integers(-1, 1)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(
    requests=requests,
    num_blocks=st.integers(9, 20),
    budget=st.integers(1, 10),
    max_num_seqs=st.integers(1, 5),
)
def test_a_small_pool_gives_the_same_tokens_as_a_big_one(
    requests: list[tuple[int, int, int, bool, int]],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
) -> None:
    worker = Worker(num_blocks, budget, max_num_seqs)
    for index, (family, length, max_tokens, own, priority) in enumerate(requests):
        worker.add(str(index), [family] * length, max_tokens, own, priority)
    worker.run()
    for index, (family, length, max_tokens, _, _) in enumerate(requests):
        expected = generate([family] * length, SamplingParams(max_tokens=max_tokens))
        assert worker.outputs[str(index)] == expected


def test_small_pools_do_preempt_and_lose_nothing() -> None:
    worker = Worker(num_blocks=12)
    for index in range(5):
        worker.add(str(index), [index] * 3, 20)
    worker.run()
    assert worker.scheduler.num_preemptions > 0
    for index in range(5):
        expected = generate([index] * 3, SamplingParams(max_tokens=20))
        assert worker.outputs[str(index)] == expected


def test_the_newest_is_preempted_first_and_the_oldest_never() -> None:
    worker = Worker(num_blocks=8)
    for index in range(3):
        worker.add(str(index), [index] * 2, 14)
    finished: list[str] = []
    while len(finished) < 3:
        before = list(worker.scheduler.running)
        batch = worker.schedule()
        gone = [s for s in before if s in worker.scheduler.preempted]
        assert gone == before[len(before) - len(gone) :]
        worker.commit(batch)
        finished += sorted(worker.finished - {*finished})
    assert worker.scheduler.num_preemptions > 0
    assert finished == ["0", "1", "2"]


def test_the_least_priority_is_preempted_first_though_it_is_the_oldest() -> None:
    worker = Worker(num_blocks=8)
    for index, priority in enumerate((1, 0, -1)):
        worker.add(str(index), [index] * 2, 14, priority=priority)
    finished: list[str] = []
    while len(finished) < 3:
        worker.commit(worker.schedule())
        finished += sorted(worker.finished - {*finished})
    assert worker.scheduler.num_preemptions > 0
    assert finished == ["2", "1", "0"]


def test_a_running_sequence_gives_way_to_one_of_more_priority_that_waits_with_blocks() -> None:
    """And its place with its blocks: the step is not empty."""
    worker = Worker(num_blocks=5, max_num_seqs=1)
    worker.add("bulk", [1] * 3, 5, priority=1)
    worker.admit()
    worker.commit(worker.schedule())
    worker.add("urgent", [2] * 3, 5)
    worker.admit()
    finished: list[str] = []
    while len(finished) < 2:
        batch = worker.schedule()
        assert batch.rows
        worker.commit(batch)
        finished += worker.finished - {*finished}
    assert finished == ["urgent", "bulk"]
    for name, token in (("bulk", 1), ("urgent", 2)):
        assert worker.outputs[name] == generate([token] * 3, SamplingParams(max_tokens=5))


def test_a_pool_that_just_fits_one_sequence() -> None:
    worker = Worker(num_blocks=6)
    for index in range(4):
        worker.add(str(index), [index] * 2, 10)
    worker.run()
    assert worker.finished == {"0", "1", "2", "3"}


def test_a_sequence_that_waits_with_blocks_gives_way_to_a_running_one() -> None:
    # Otherwise the only running one preempts itself, and the step is empty with work left.
    worker = Worker(num_blocks=4, max_num_seqs=1)
    for index in range(2):
        worker.add(str(index), [index] * 3, 5)
    worker.admit()
    assert len(worker.scheduler.admitted) == 2
    worker.run()
    assert worker.finished == {"0", "1"}
    assert worker.scheduler.num_preemptions == 1


def test_newcomers_wait_for_preempted_sequences_and_leave_room_to_grow() -> None:
    worker = Worker(num_blocks=5)
    for index in range(2):
        worker.add(str(index), [index] * 2, 8)
    worker.commit(worker.schedule())
    assert worker.scheduler.headroom == 2
    while not worker.scheduler.preempted:
        worker.commit(worker.schedule())
    assert worker.scheduler.headroom is None


def test_prompts_are_computed_in_chunks_between_the_tokens_of_others() -> None:
    worker = Worker(budget=4)
    worker.add("running", [1] * 3, 9)
    worker.commit(worker.schedule())
    worker.add("prompt", [2] * 10, 3, own=True)
    steps = []
    while not worker.outputs.get("prompt"):
        batch = worker.schedule()
        steps.append([(row.sequence.request_id, row.num_tokens) for row in batch.rows])
        worker.commit(batch)
    assert steps == [[("running", 1), ("prompt", 3)]] * 3 + [[("running", 1), ("prompt", 1)]]
    worker.run()
    assert worker.outputs["prompt"] == generate([2] * 10, SamplingParams(max_tokens=3))


def test_prompts_that_begin_alike_are_computed_once_though_they_come_at_once() -> None:
    worker = Worker(budget=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    sequences = [worker.add(str(index), prompt, 3, own=True) for index in range(3)]
    num_computed = 0
    while len(worker.finished) < 3:
        batch = worker.schedule()
        num_computed += sum(
            min(row.end, len(prompt)) - row.start for row in batch.rows if row.start < len(prompt)
        )
        worker.commit(batch)
    assert num_computed == len(prompt) + 2
    assert [sequence.num_cached for sequence in sequences] == [0, 8, 8]
    for output in worker.outputs.values():
        assert output == generate(prompt, SamplingParams(max_tokens=3))


def test_prompts_keep_half_the_budget_however_many_sequences_generate() -> None:
    worker = Worker(budget=4)
    for index in range(6):
        worker.add(str(index), [index] * 2, 9)
    worker.commit(worker.schedule())
    worker.add("prompt", [7] * 9, 2, own=True)
    rows = worker.schedule().rows
    assert [row.num_tokens for row in rows] == [1] * 6 + [2]


def test_a_prompt_preempted_half_way_counts_only_what_others_had_cached() -> None:
    worker = Worker(num_blocks=8, budget=2)
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=0)
    prompt = worker.add("prompt", [1] * 8, 2, own=True)
    scored = Sequence("scored", [2] * 4, 4, sampling)
    for sequence in (prompt, scored):
        assert worker.pool.reserve(sequence, sequence.num_cacheable)
        worker.scheduler.add(sequence)
    worker.waiting.clear()
    worker.outputs |= {"prompt": [], "scored": []}
    worker.commit(worker.schedule())
    scored.prompt_logprobs.append(TokenLogprobs(logprob=-1.0, rank=1, top=[]))
    for sequence in (prompt, scored):
        worker.scheduler.running.remove(sequence)
        worker.scheduler._preempt(sequence)
    assert scored.prompt_logprobs == []  # its prompt is scored again, from its first token
    worker.run()
    assert worker.outputs["prompt"] == generate([1] * 8, SamplingParams(max_tokens=2))
    assert (prompt.num_cached, scored.num_cached) == (0, 0)


def test_a_sequence_handed_off_without_its_blocks_is_computed_from_its_tokens() -> None:
    worker = Worker(budget=3)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    damaged = worker.add("damaged", prompt, 6)
    worker.waiting.clear()
    worker.hand_off(damaged)
    worker.run()
    assert damaged.recomputed
    assert worker.outputs["damaged"] == generate(prompt, SamplingParams(max_tokens=6))


@pytest.mark.parametrize("inside_step", [False, True])
@pytest.mark.parametrize("num_blocks", [9, 40])
def test_cancel_at_every_step_of_every_sequence(inside_step: bool, num_blocks: int) -> None:
    lengths = {"a": (5, 9), "b": (2, 12), "c": (7, 4), "d": (1, 10)}
    for cancelled in lengths:
        for cancel_at in range(30):
            worker = Worker(num_blocks, budget=4, max_num_seqs=3)
            for request_id, (length, max_tokens) in lengths.items():
                worker.add(request_id, [length] * length, max_tokens)
            for index in range(cancel_at + 1):
                batch = worker.schedule() if inside_step else None
                if index == cancel_at:
                    worker.cancel(cancelled)
                    worker.cancel(cancelled)
                worker.commit(batch or worker.schedule())
            gone = list(worker.outputs.get(cancelled, []))
            worker.run()
            assert worker.outputs.get(cancelled, []) == gone
            for request_id in lengths.keys() - {cancelled}:
                length, max_tokens = lengths[request_id]
                expected = generate([length] * length, SamplingParams(max_tokens=max_tokens))
                assert worker.outputs[request_id] == expected


def test_a_cancelled_sequences_blocks_are_fenced_until_its_step_ends() -> None:
    worker = Worker(num_blocks=4)
    worker.add("a", [1] * 4, 4)
    batch = worker.schedule()
    worker.scheduler.cancel("a")
    assert worker.pool.num_used == 3
    worker.check()
    worker.commit(batch)
    assert worker.pool.num_used == 0
    assert worker.outputs["a"] == generate([1] * 4, SamplingParams(max_tokens=1))


def test_random_arrivals_and_cancels_leave_nothing_behind() -> None:
    for seed in range(150):
        random = Random(seed)
        worker = Worker(random.choice((8, 12, 30)), random.randint(1, 9), random.randint(1, 5))
        prompts: dict[str, tuple[list[int], int]] = {}
        for index in range(30):
            if random.random() < 0.3:
                prompt = [random.randrange(2)] * random.randint(1, 6)
                prompts[str(index)] = prompt, random.randint(2, 9)
                worker.add(str(index), *prompts[str(index)], own=random.random() < 0.5)
            batch = worker.schedule()
            if prompts and random.random() < 0.1:
                worker.cancel(random.choice(list(prompts)))
            worker.commit(batch)
        worker.run()
        for request_id, (prompt, max_tokens) in prompts.items():
            expected = generate(prompt, SamplingParams(max_tokens=max_tokens))
            output = worker.outputs.get(request_id, [])
            assert output == expected[: len(output)]
            assert request_id in worker.cancelled or output == expected
