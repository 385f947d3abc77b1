"""What a step's rows turn into."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_metadata import AttentionMetadata
from kernels.decode_items import ALONE


def metadata() -> AttentionMetadata:
    return AttentionMetadata.build([[4, 7], [], [1, 2, 3]], [2, 0, 1], [20, 0, 600], "cpu")


def test_rows_on_device_and_host() -> None:
    meta = metadata()
    assert meta.block_tables.shape == (3, 3)
    assert meta.block_tables[0, :2].tolist() == [4, 7]
    assert meta.block_tables[2].tolist() == [1, 2, 3]
    assert meta.query_starts.tolist() == [0, 2, 2, 3]
    assert meta.context_lens.tolist() == [20, 0, 600]
    tensors = (meta.block_tables, meta.query_starts, meta.context_lens)
    assert {tensor.dtype for tensor in tensors} == {torch.int32}
    assert (meta.query_lens, meta.contexts) == ((2, 0, 1), (20, 0, 600))


def test_no_rows() -> None:
    meta = AttentionMetadata.build([], [], [], "cpu")
    assert meta.block_tables.shape == (0, 0)
    assert meta.query_starts.tolist() == [0]


def test_more_queries_than_tokens() -> None:
    with pytest.raises(ValueError, match="a row of 3 tokens cannot have 4 queries"):
        AttentionMetadata.build([[0]], [4], [3], "cpu")


def test_decode_items() -> None:
    work = metadata().decode_items(0)
    assert work.items.tolist() == [
        [2, 0, 256, 0],
        [2, 256, 512, 1],
        [2, 512, 600, 2],
        [0, 0, 20, ALONE],
        [1, 0, 0, ALONE],
    ]
    assert work.count.tolist() == [5]
    assert work.row_starts.tolist() == [0, 0, 0, 3]
    assert work.num_places == 3
    assert work.items.dtype == work.count.dtype == work.row_starts.dtype == torch.int32


def test_decode_items_leave_out_what_a_window_hides() -> None:
    work = metadata().decode_items(100)
    assert [2, 500, 512, 0] in work.items.tolist()
    assert [2, 512, 600, 1] in work.items.tolist()
    assert work.num_places == 2


def test_balanced_decode_items() -> None:
    meta = AttentionMetadata.build([[], []], [1, 1], [64, 600], "cpu", balance_over=4)
    assert meta.decode_items(0).items.tolist() == [
        [1, 0, 192, 0],
        [1, 192, 384, 1],
        [1, 384, 576, 2],
        [0, 0, 64, ALONE],
        [1, 576, 600, 3],
    ]


def test_prefill_tiles_start_with_the_longest() -> None:
    meta = AttentionMetadata.build([[0], [1]], [100, 40], [100, 500], "cpu")
    assert meta.prefill_tiles(32).tolist() == [[1, 32], [1, 0], [0, 96], [0, 64], [0, 32], [0, 0]]


def test_no_prefill_tiles_without_queries() -> None:
    assert AttentionMetadata.build([[0]], [0], [5], "cpu").prefill_tiles(32).shape == (0, 2)


def test_derived_values_are_computed_once() -> None:
    meta = metadata()
    assert meta.decode_items(0) is meta.decode_items(0)
    assert meta.prefill_tiles(32) is meta.prefill_tiles(32)
    assert meta.query_tiles(16, 5) is meta.query_tiles(16, 5)
    assert meta.query_tiles(16, 5) is not meta.query_tiles(16, 0)
