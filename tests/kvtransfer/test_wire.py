"""Cutting batches into messages, and what a tag says."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.config import TransferConfig
from kvtransfer.wire import MAX_COUNT, MAX_GRANT_ID, MAX_POSITIONS, Tag, cut, is_run

CONFIG = TransferConfig(stage_below=1024, staging_bytes=4096, message_bytes=8192)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Source and destination blocks with many runs in both."""
    sides = []
    count = draw(st.integers(1, 60))
    for _ in range(2):
        blocks: list[int] = []
        while len(blocks) < count:
            start = draw(st.integers(0, 1000))
            blocks += range(start, start + draw(st.integers(1, 20)))
        sides.append(blocks[:count])
    return sides[0], sides[1]


@given(batches(), st.sampled_from([8, 512, 1024, 3000, 8192, 10000]), st.integers(0, 1000))
def test_messages_cover_every_position_once(
    batch: tuple[list[int], list[int]], row_bytes: int, first: int
) -> None:
    source, destination = batch
    pieces = cut(first, source, destination, row_bytes, CONFIG)
    assert [block for piece in pieces for block in piece.source] == source
    position = first
    for piece in pieces:
        assert piece.first == position
        position += len(piece.source)
        num_bytes = len(piece.source) * row_bytes
        start = piece.first - first
        straight = is_run(piece.source) and is_run(destination[start : start + len(piece.source)])
        if straight:
            assert num_bytes <= CONFIG.message_bytes or len(piece.source) == 1
        else:
            assert row_bytes < CONFIG.stage_below
            assert num_bytes <= CONFIG.staging_bytes


@given(batches(), st.sampled_from([512, 1024, 3000]))
def test_no_two_messages_could_have_been_one(
    batch: tuple[list[int], list[int]], row_bytes: int
) -> None:
    source, destination = batch
    packed = row_bytes < CONFIG.stage_below
    pieces = cut(0, source, destination, row_bytes, CONFIG)
    for piece, after in itertools.pairwise(pieces):
        joint = slice(piece.first, after.first + 1)  # with one more block
        num_bytes = (len(piece.source) + 1) * row_bytes
        if is_run(source[joint]) and is_run(destination[joint]):
            assert num_bytes > CONFIG.message_bytes
        else:
            assert not packed or num_bytes > CONFIG.staging_bytes


def test_tiny_rows_keep_the_count_within_its_bits() -> None:
    blocks = range(2 * MAX_COUNT + 1)
    pieces = cut(0, blocks, blocks, 8, TransferConfig())
    assert [len(piece.source) for piece in pieces] == [MAX_COUNT, MAX_COUNT, 1]


@given(st.integers(1, MAX_GRANT_ID), st.integers(0, MAX_POSITIONS - 1), st.integers(0, MAX_COUNT))
def test_a_tag_says_what_was_packed(grant_id: int, first: int, count: int) -> None:
    bits = Tag(grant_id, first, count).pack()
    assert 0 <= bits < 2**64
    assert Tag.unpack(bits) == Tag(grant_id, first, count)
