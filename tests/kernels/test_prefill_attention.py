"""Prefill attention against dense float64 attention."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_metadata import AttentionMetadata
from tests.kernels.accuracy import assert_close
from tests.kernels.implementation import decode_attention, prefill_attention
from tests.kernels.paged import Paged, Shape, dense_attention, paged, queries
from tests.kernels.poison import unchanged, uninitialized_is_nan

pytestmark = pytest.mark.usefixtures("implementation")

FP16, BF16 = torch.float16, torch.bfloat16


def check(cache: Paged, query_lens: list[int], *, window: int = 0, scale: float = 0.2) -> None:
    q = queries(cache.shape, sum(query_lens))
    meta = cache.metadata(query_lens)
    with uninitialized_is_nan(), unchanged(cache.kv):
        result = prefill_attention(q, cache.kv, meta, scale=scale, window=window)
    expected = torch.cat(
        [
            dense_attention(part, row, scale, window)
            for part, row in zip(q.split(query_lens), cache.rows, strict=True)
        ]
    )
    assert result.dtype == q.dtype
    assert_close(result, expected)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(group=1, head_dim=64, block_size=16, dtype=FP16),
        Shape(group=2, head_dim=32, block_size=16),
        Shape(group=3, head_dim=80, block_size=64),
        Shape(group=4, head_dim=128, block_size=64, dtype=FP16),
        Shape(group=7, kv_heads=1, head_dim=96, block_size=16),
        Shape(group=8, kv_heads=1, head_dim=128, block_size=64, dtype=BF16),
        Shape(group=1, kv_heads=1, head_dim=64, block_size=128, dtype=FP16),
        Shape(group=16, kv_heads=1, head_dim=256, block_size=16, dtype=FP16),
    ],
    ids=str,
)
def test_whole_prompts_and_chunks(shape: Shape) -> None:
    size = shape.block_size
    check(paged(shape, [size - 1, size + 1, 2 * size + 3, 65]), [size - 1, 2, size, 1])


def test_many_query_tiles() -> None:
    check(paged(Shape(kv_heads=1, dtype=FP16), [300, 280]), [300, 270])


def test_a_row_without_queries_gives_nothing() -> None:
    check(paged(Shape(), [20, 17, 5]), [3, 0, 5])


@pytest.mark.parametrize("window", [1, 16, 33, 64, 130])
def test_window(window: int) -> None:
    shape = Shape(kv_heads=1, dtype=FP16)
    check(paged(shape, [150, 20, 90]), [150, 7, 30], window=window)


def test_window_wider_than_a_tile_of_queries_and_keys() -> None:
    shape = Shape(group=16, kv_heads=1, dtype=FP16)  # 8 tokens to a tile of queries
    check(paged(shape, [330]), [20], window=250)


def test_large_scores_do_not_overflow() -> None:
    check(paged(Shape(), [70]), [70], scale=30.0)


def test_rows_share_blocks() -> None:
    check(paged(Shape(), [40, 37, 33], shared_blocks=2), [8, 5, 1])


def test_a_row_does_not_depend_on_the_others() -> None:
    cache = paged(Shape(), [70, 20, 33])
    lens = [40, 20, 2]
    q = queries(cache.shape, sum(lens))
    together = prefill_attention(q, cache.kv, cache.metadata(lens), scale=0.2, window=0)
    parts = zip(q.split(lens), together.split(lens), strict=True)
    for row, (part, expected) in enumerate(parts):
        meta = AttentionMetadata.build(
            [cache.tables[row]], [lens[row]], [cache.contexts[row]], "cpu"
        )
        assert torch.equal(prefill_attention(part, cache.kv, meta, scale=0.2, window=0), expected)


def test_chunks_equal_the_whole() -> None:
    cache = paged(Shape(), [75])
    q = queries(cache.shape, 75)
    whole = prefill_attention(q, cache.kv, cache.metadata([75]), scale=0.2, window=0)
    start = 0
    for end in (30, 31, 75):
        meta = AttentionMetadata.build(cache.tables, [end - start], [end], "cpu")
        chunk = prefill_attention(q[start:end], cache.kv, meta, scale=0.2, window=0)
        assert_close(chunk, whole[start:end].double())
        start = end


@pytest.mark.parametrize("window", [0, 20])
def test_one_query_is_decode(window: int) -> None:
    cache = paged(Shape(), [75, 16, 1])
    q = queries(cache.shape, 3)
    meta = cache.metadata([1, 1, 1])
    decoded = decode_attention(q, cache.kv, meta, scale=0.2, window=window)
    prefilled = prefill_attention(q, cache.kv, meta, scale=0.2, window=window)
    assert_close(prefilled, decoded.double())
