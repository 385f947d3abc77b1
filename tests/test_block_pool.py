"""The block pool against a model that keeps every block's tokens in plain lists."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

BLOCK_SIZE = 2
NUM_BLOCKS = 7
SAMPLING = SamplingParams(max_tokens=100)

tokens = st.integers(0, 1)
prompts = st.lists(tokens, min_size=1, max_size=9)


def make(token_ids: list[int]) -> Sequence:
    return Sequence("r", list(token_ids), len(token_ids), SAMPLING)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow, share and go; ``holds`` says what each block contains."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, salt=b"salt")
        self.sequences: list[Sequence] = []
        self.leases: list[list[int]] = []
        # The tokens up to and including those in the block, by block; what a hit must find.
        self.holds: dict[int, tuple[int, ...]] = {}

    def owners(self) -> list[list[int]]:
        return [s.block_table for s in self.sequences] + self.leases

    @rule(prompt=prompts, headroom=st.integers(0, 3), keep=st.integers(0, 2))
    def reserve(self, prompt: list[int], headroom: int, keep: int) -> None:
        sequence, free = make(prompt), self.pool.num_free
        used = {block for blocks in self.owners() for block in blocks}
        max_cached = max(0, len(prompt) - keep)
        prefix = self._findable(prompt, max_cached)
        needed = self.pool.blocks_for(len(prompt))
        fresh = needed - len([block for block in prefix if block in used])
        fits = self.pool.reserve(sequence, max_cached, headroom)
        assert fits == (fresh + headroom <= free)
        if not fits:
            assert sequence.block_table == []
            assert self.pool.num_free == free
            return
        assert len(sequence.block_table) == needed
        assert sequence.block_table[: len(prefix)] == prefix
        assert sequence.num_computed == sequence.num_cached == len(prefix) * BLOCK_SIZE
        assert self.pool.num_free == free - fresh
        for block in sequence.block_table[len(prefix) :]:
            assert block not in used
            self.holds.pop(block, None)
        self.sequences.append(sequence)

    def _findable(self, prompt: list[int], max_cached: int) -> list[int]:
        """The longest prefix, in whole blocks, that some block still holds."""
        found: list[int] = []
        for end in range(BLOCK_SIZE, max_cached + 1, BLOCK_SIZE):
            wanted = tuple(prompt[:end])
            blocks = [block for block, held in self.holds.items() if held == wanted]
            if not blocks:
                break
            assert len(blocks) == 1, "two findable blocks hold the same prefix"
            found += blocks
        return found

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=st.lists(tokens, max_size=5))
    def compute(self, data: st.DataObject, new: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        free, missing = self.pool.num_free, 0
        missing = self.pool.blocks_for(sequence.num_tokens + len(new)) - len(sequence.block_table)
        grown = self.pool.grow(sequence, sequence.num_tokens + len(new))
        assert grown == (missing <= free)
        if not grown:
            assert self.pool.num_free == free
            return
        for block in sequence.block_table[len(sequence.block_table) - missing :]:
            self.holds.pop(block, None)
        sequence.token_ids += new
        before = sequence.num_computed
        sequence.num_computed = data.draw(st.integers(before, sequence.num_tokens))
        self.pool.publish(sequence, before)
        for index in range(before // BLOCK_SIZE, sequence.num_computed // BLOCK_SIZE):
            held = tuple(sequence.token_ids[: (index + 1) * BLOCK_SIZE])
            if held not in self.holds.values():
                self.holds[sequence.block_table[index]] = held

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        blocks = sequence.block_table[data.draw(st.integers(0, len(sequence.block_table))) :]
        self.pool.retain(blocks)
        self.leases.append(blocks)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        blocks = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release_sequence(sequence)
        assert sequence.block_table == []
        assert sequence.num_computed == 0

    @invariant()
    def references_are_exactly_the_owners(self) -> None:
        self.pool.check_integrity(self.owners())
        assert self.pool.num_used == len({b for blocks in self.owners() for b in blocks})

    def teardown(self) -> None:
        for blocks in self.owners():
            self.pool.release(blocks)
        self.pool.check_integrity([])
        assert self.pool.num_used == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def fill(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Compute a prompt, release it, and return the blocks it used."""
    sequence = make(token_ids)
    assert pool.reserve(sequence, 0)
    sequence.num_computed = sequence.num_tokens
    pool.publish(sequence, 0)
    blocks = sequence.block_table
    pool.release_sequence(sequence)
    return blocks


def cached_tokens(pool: BlockPool, token_ids: list[int]) -> int:
    """How much of a prompt the pool still has; leaves no trace but the order of eviction."""
    sequence = make(token_ids)
    assert pool.reserve(sequence, len(token_ids))
    found = sequence.num_cached
    pool.release_sequence(sequence)
    return found


def test_blocks_are_taken_unnamed_first_then_least_recently_used_last_block_first() -> None:
    pool = BlockPool(6, 2)
    first = fill(pool, [1, 1, 1, 1])
    second = fill(pool, [2, 2, 2, 2])
    unnamed = pool.allocate(2)
    assert unnamed is not None
    assert cached_tokens(pool, [1, 1, 1, 1]) == 4  # the first is now the most recently used
    pool.release(unnamed)
    taken = pool.allocate(6)
    assert taken is not None
    assert set(taken[:2]) == {*unnamed}
    assert taken[2:] == [*reversed(second), *reversed(first)]


def test_a_block_taken_for_something_else_is_not_found() -> None:
    pool = BlockPool(2, 2)
    fill(pool, [1, 1, 1, 1])
    fill(pool, [2, 2])
    assert cached_tokens(pool, [1, 1, 1, 1]) == 2  # the later block went first
    assert cached_tokens(pool, [2, 2]) == 0  # and the probe took it


def test_a_partly_filled_block_is_never_found() -> None:
    pool = BlockPool(4, 4)
    fill(pool, [1, 2, 3, 4, 5])
    assert cached_tokens(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == 4


def test_equal_tokens_after_a_different_start_are_not_found() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [1, 1, 5, 5])
    assert cached_tokens(pool, [2, 2, 5, 5]) == 0
    assert cached_tokens(pool, [5, 5]) == 0


def test_salts_separate() -> None:
    names = set()
    for salt in (b"", b"a", b"b"):
        sequence = make([1, 2])
        BlockPool(1, 2, salt).extend_hashes(sequence)
        names.update(sequence.block_hashes)
    assert len(names) == 3


def test_requests_share_blocks_only_under_the_same_cache_salt() -> None:
    pool = BlockPool(12, 2)
    names = set()
    for cache_salt in ("", "a", "b"):
        for cached in (0, 2):
            sequence = make([1, 2, 3])
            sequence.cache_salt = cache_salt
            assert pool.reserve(sequence, max_cached_tokens=2)
            assert sequence.num_computed == cached
            sequence.num_computed = 3
            pool.publish(sequence, cached)
            names.update(sequence.block_hashes)
    assert len(names) == 3


def test_a_sequence_larger_than_the_pool_changes_nothing() -> None:
    pool = BlockPool(2, 2)
    fill(pool, [1, 1])
    assert not pool.reserve(make([1, 1, 2, 2, 3]), 5)
    assert pool.num_used == 0
    assert pool.allocate(3) is None
    assert cached_tokens(pool, [1, 1]) == 2


def test_headroom_counts_cached_blocks_that_would_be_taken() -> None:
    pool = BlockPool(2, 2)
    fill(pool, [1, 1])
    assert not pool.reserve(make([1, 1]), 2, headroom=2)
    assert pool.reserve(make([1, 1]), 2, headroom=1)


def test_double_release_and_retain_of_a_free_block_are_errors() -> None:
    pool = BlockPool(1, 1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released without a reference"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="retained without a reference"):
        pool.retain(blocks)


def test_check_integrity_names_a_leaked_block() -> None:
    pool = BlockPool(2, 1)
    blocks = pool.allocate(1)
    pool.check_integrity([blocks or []])
    with pytest.raises(AssertionError, match="block 0: 1 references, 0 owners"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="block 1: 0 references, 1 owners"):
        pool.check_integrity([[0, 1]])


# blake2b (16 bytes, key "salt") of (1, 2), then of that digest and (70000, 4), as <u4.
KNOWN = ["727b55b0c22642be8e3d327fef18bb83", "1cfc2309d0c5d42ecd9bbdf475a5b949"]

PROGRAM = """
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.sampling import SamplingParams
sequence = Sequence("r", [1, 2, 70000, 4, 5], 5, SamplingParams(max_tokens=1))
BlockPool(4, 2, b"salt").extend_hashes(sequence)
print(*(name.hex() for name in sequence.block_hashes))
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_names_do_not_depend_on_the_process(hash_seed: str) -> None:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": "."},
        capture_output=True,
        check=True,
        text=True,
    )
    assert output.stdout.split() == KNOWN
