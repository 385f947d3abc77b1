"""A bucket's metadata gives what metadata made for the batch gives, at addresses that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.decode_bucket import DecodeBucket
from tests.kernels.implementation import INTERPRETED, decode_attention
from tests.kernels.paged import Paged, Shape, paged, queries

MAX_CONTEXT = 640


def bucket(rows: int, *, balance_over: int = 0) -> DecodeBucket:
    return DecodeBucket(rows, MAX_CONTEXT, 16, [0, 40, 0], "cpu", balance_over=balance_over)


def addresses(filled: DecodeBucket, cache: Paged) -> list[int]:
    meta = filled.fill(cache.tables, cache.contexts)
    tensors: list[Tensor] = [meta.block_tables, meta.query_starts, meta.context_lens]
    for window in (0, 40):
        work = meta.decode_items(window)
        tensors += [work.items, work.count, work.row_starts]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("window", [0, 40])
def test_padded_equals_unpadded(window: int) -> None:
    filled = bucket(6)
    for contexts in ([600, 3, 257, 16], [1], [20, 640, 256, 5, 6, 7]):
        cache = paged(Shape(kv_heads=1), contexts)
        q = queries(cache.shape, 6)
        meta = filled.fill(cache.tables, contexts)
        padded = decode_attention(q, cache.kv, meta, scale=0.2, window=window)
        rows = len(contexts)
        own = cache.metadata([1] * rows)
        exact = decode_attention(q[:rows], cache.kv, own, scale=0.2, window=window)
        assert torch.equal(padded[:rows], exact)
        assert (padded[rows:] == 0).all()


@pytest.mark.parametrize("balance_over", [0, 7])
def test_addresses_and_shapes_stay(balance_over: int) -> None:
    filled = bucket(4, balance_over=balance_over)
    first, second = paged(Shape(), [600, 3]), paged(Shape(), [640, 640, 640, 640])
    assert addresses(filled, first) == addresses(filled, second)


def test_on_device_and_host() -> None:
    meta = bucket(3).fill([[4, 7], [5]], [20, 16])
    assert meta.context_lens.tolist() == [20, 16, 0]
    assert meta.contexts == (20, 16, 0)
    assert meta.query_lens == (1, 1, 0)
    assert meta.query_starts.tolist() == [0, 1, 2, 2]
    assert meta.block_tables.shape == (3, MAX_CONTEXT // 16)
    assert meta.block_tables[0, :2].tolist() == [4, 7]


@pytest.mark.skipif(not INTERPRETED, reason="the torch twin reads lengths on the host")
def test_a_captured_call_computes_what_the_bucket_holds_now() -> None:
    filled = bucket(2)
    cache = paged(Shape(kv_heads=1), [300, 3])
    captured = filled.fill(cache.tables, cache.contexts)
    q = queries(cache.shape, 2)
    filled.fill(cache.tables[::-1], cache.contexts[::-1])
    replayed = decode_attention(q, cache.kv, captured, scale=0.2, window=0)
    own = Paged(cache.shape, cache.kv, cache.tables[::-1], cache.rows[::-1]).metadata([1, 1])
    assert torch.equal(replayed, decode_attention(q, cache.kv, own, scale=0.2, window=0))


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 rows do not fit a bucket of 2"):
        bucket(2).fill([[0]] * 3, [1, 1, 1])
    with pytest.raises(ValueError, match="a row of 641 tokens does not fit a bucket of 640"):
        bucket(2).fill([[0]], [641])
