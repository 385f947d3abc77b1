"""A sequence's block table as an array that follows the list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.sequence import Sequence
from protocol.sampling import SamplingParams

Blocks = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(st.lists(st.tuples(st.booleans(), Blocks), max_size=10))
def test_the_array_follows_the_block_table(changes: list[tuple[bool, list[int]]]) -> None:
    sequence = Sequence("request", [1], 1, SamplingParams(max_tokens=1))
    assert sequence.blocks().tolist() == []
    for replaced, blocks in changes:
        if replaced:
            sequence.block_table = blocks  # after a preemption
        else:
            sequence.block_table += blocks
        assert sequence.blocks().tolist() == sequence.block_table
