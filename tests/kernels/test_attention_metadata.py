"""What a step's rows turn into."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_metadata import AttentionMetadata


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


def test_decode_items_cover_each_row_in_chunks() -> None:
    items = metadata().decode_items(256, 0)
    assert items.rows.tolist() == [0, 2, 2, 2]
    assert items.starts.tolist() == [0, 0, 256, 512]
    assert items.row_starts.tolist() == [0, 1, 1, 4]
    assert not items.single


def test_decode_items_leave_out_what_a_window_hides() -> None:
    items = metadata().decode_items(256, 100)  # row 2 sees keys from 500 on
    assert items.rows.tolist() == [0, 2, 2]
    assert items.starts.tolist() == [0, 256, 512]


def test_single_items() -> None:
    assert AttentionMetadata.build([[0], [1]], [1, 1], [5, 7], "cpu").decode_items(256, 0).single


def test_prefill_tiles_start_with_the_longest() -> None:
    meta = AttentionMetadata.build([[0], [1]], [100, 40], [100, 500], "cpu")
    rows, starts = meta.prefill_tiles(32)
    assert list(zip(rows.tolist(), starts.tolist(), strict=True)) == [
        (1, 32),
        (1, 0),
        (0, 96),
        (0, 64),
        (0, 32),
        (0, 0),
    ]


def test_derived_values_are_computed_once() -> None:
    meta = metadata()
    assert meta.decode_items(256, 0) is meta.decode_items(256, 0)
    assert meta.prefill_tiles(32) is meta.prefill_tiles(32)
    assert meta.query_tiles(16, 5) is meta.query_tiles(16, 5)
    assert meta.query_tiles(16, 5) is not meta.query_tiles(16, 0)
