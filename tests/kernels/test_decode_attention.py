"""Decode attention against dense float64 attention."""

from __future__ import annotations

import pytest
import torch

from kernels import decode_items
from kernels.attention_metadata import AttentionMetadata
from tests.kernels.accuracy import assert_close
from tests.kernels.implementation import decode_attention
from tests.kernels.paged import Paged, Shape, dense_attention, paged, queries
from tests.kernels.poison import unchanged, uninitialized_is_nan

pytestmark = pytest.mark.usefixtures("implementation")

FP16, BF16 = torch.float16, torch.bfloat16


def check(cache: Paged, *, window: int = 0, scale: float = 0.2, balance_over: int = 0) -> None:
    contexts = cache.contexts
    q = queries(cache.shape, len(contexts))
    query_lens = [min(context, 1) for context in contexts]
    meta = AttentionMetadata.build(
        cache.tables, query_lens, contexts, "cpu", balance_over=balance_over
    )
    with uninitialized_is_nan(), unchanged(cache.kv):
        result = decode_attention(q, cache.kv, meta, scale=scale, window=window)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for index, (query, row) in enumerate(zip(q, cache.rows, strict=True)):
        if row.shape[1]:
            expected[index] = dense_attention(query.unsqueeze(0), row, scale, window)[0]
    assert result.dtype == q.dtype
    assert_close(result, expected)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(group=1, head_dim=64, block_size=16, dtype=FP16),
        Shape(group=2, head_dim=32, block_size=16),
        Shape(group=3, head_dim=80, block_size=64),
        Shape(group=4, head_dim=128, block_size=64, dtype=FP16),
        Shape(group=7, head_dim=96, block_size=16),
        Shape(group=8, kv_heads=1, head_dim=128, block_size=64, dtype=BF16),
        Shape(group=16, kv_heads=1, head_dim=256, block_size=128, dtype=FP16),
    ],
    ids=str,
)
def test_lengths_around_block_and_tile(shape: Shape) -> None:
    size = shape.block_size
    check(paged(shape, [1, size - 1, size, size + 1, 2 * size + 3, 65]))


def test_long_rows_are_split_and_combined() -> None:
    check(paged(Shape(block_size=64), [1100, 3, 512, 513]))


def test_no_row_is_split() -> None:
    check(paged(Shape(), [256, 255, 1]))


def test_a_row_of_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_items, "PART", 64)
    check(paged(Shape(kv_heads=1), [64 * 20 + 5, 64 * 16, 7]))  # the combination takes 16 at once


@pytest.mark.parametrize("window", [0, 100])
def test_balanced_over_programs(window: int) -> None:
    check(paged(Shape(), [700, 3, 90, 0, 64]), window=window, balance_over=6)


def test_a_row_without_tokens_is_zero() -> None:
    cache = paged(Shape(), [0, 20, 0])
    q = queries(cache.shape, 3)
    result = decode_attention(q, cache.kv, cache.metadata([0, 1, 0]), scale=0.2, window=0)
    assert (result[0] == 0).all()
    assert (result[2] == 0).all()
    check(cache)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 70])
def test_window(window: int) -> None:
    check(paged(Shape(), [1, 16, 17, 90, 140]), window=window)


def test_window_across_parts() -> None:
    check(paged(Shape(block_size=64), [600, 1030, 40]), window=100)


def test_large_scores_do_not_overflow() -> None:
    check(paged(Shape(), [40, 130]), scale=30.0)


def test_rows_share_blocks() -> None:
    check(paged(Shape(), [40, 37, 33], shared_blocks=2))


def test_a_row_does_not_depend_on_the_others() -> None:
    cache = paged(Shape(block_size=64), [700, 5, 64])
    q = queries(cache.shape, 3)
    together = decode_attention(q, cache.kv, cache.metadata([1, 1, 1]), scale=0.2, window=0)
    for row, context in enumerate(cache.contexts):
        meta = AttentionMetadata.build([cache.tables[row]], [1], [context], "cpu")
        alone = decode_attention(q[row : row + 1], cache.kv, meta, scale=0.2, window=0)
        assert torch.equal(alone[0], together[row])


def test_where_blocks_lie_does_not_matter() -> None:
    cache = paged(Shape(), [50, 90])
    q = queries(cache.shape, 2)
    order = torch.randperm(len(cache.kv), generator=torch.Generator().manual_seed(5))
    place = {int(old): new for new, old in enumerate(order)}
    moved = AttentionMetadata.build(
        [[place.get(block, block) for block in table] for table in cache.tables],
        [1, 1],
        cache.contexts,
        "cpu",
    )
    before = decode_attention(q, cache.kv, cache.metadata([1, 1]), scale=0.2, window=0)
    after = decode_attention(q, cache.kv[order], moved, scale=0.2, window=0)
    assert torch.equal(before, after)
