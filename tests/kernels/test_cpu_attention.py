"""What the C++ attention kernels do differently by type, size and number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.cpu import library
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention
from tests.kernels.accuracy import assert_close
from tests.kernels.paged import Paged, Shape, dense_attention, paged, queries
from tests.kernels.poison import unchanged, uninitialized_is_nan

pytestmark = pytest.mark.skipif(library.load() is None, reason="there is no C++ compiler")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# Head sizes that are and are not whole vectors of 16 or 32; blocks shorter and longer than those.
SHAPES = [
    Shape(group=1, kv_heads=3, head_dim=8, block_size=8, dtype=BF16),
    Shape(group=3, head_dim=40, block_size=8, dtype=BF16),
    Shape(group=2, head_dim=64, block_size=16, dtype=BF16),
    Shape(group=5, kv_heads=1, head_dim=80, block_size=16, dtype=BF16),
    Shape(group=64, kv_heads=1, head_dim=16, block_size=32, dtype=BF16),
    Shape(group=2, head_dim=256, block_size=64, dtype=BF16),
    Shape(group=3, head_dim=72, block_size=24, dtype=FP16),
    Shape(group=7, kv_heads=1, head_dim=120, block_size=16, dtype=FP32),
    Shape(group=1, head_dim=264, block_size=16, dtype=BF16),  # left to torch
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check_decode(cache: Paged, window: int) -> None:
    q = queries(cache.shape, len(cache.contexts))
    meta = cache.metadata([min(context, 1) for context in cache.contexts])
    with unchanged(cache.kv), uninitialized_is_nan():
        result = decode_attention(q, cache.kv, meta, scale=0.2, window=window)
    for query, row, got in zip(q, cache.rows, result, strict=True):
        if row.shape[1]:
            assert_close(got[None], dense_attention(query[None], row, 0.2, window))
        else:
            assert (got == 0).all()


def check_prefill(cache: Paged, query_lens: list[int], window: int) -> None:
    q = queries(cache.shape, sum(query_lens))
    meta = cache.metadata(query_lens)
    with unchanged(cache.kv), uninitialized_is_nan():
        result = prefill_attention(q, cache.kv, meta, scale=0.2, window=window)
    parts = zip(q.split(query_lens), result.split(query_lens), cache.rows, strict=True)
    for part, got, row in parts:
        if len(part):
            assert_close(got, dense_attention(part, row, 0.2, window))


@shapes
@pytest.mark.parametrize("window", [0, 1, 37])
def test_decode(shape: Shape, window: int) -> None:
    check_decode(paged(shape, [1, 15, 16, 17, 0, 64, 100]), window)


@pytest.mark.parametrize("window", [0, 500, 900])
def test_decode_of_rows_cut_in_splits(window: int) -> None:
    check_decode(paged(Shape(kv_heads=1, dtype=BF16), [511, 512, 513, 1030, 40]), window)


@shapes
@pytest.mark.parametrize("window", [0, 1, 37])
def test_prefill(shape: Shape, window: int) -> None:
    check_prefill(paged(shape, [1, 16, 17, 70, 33]), [1, 5, 0, 20, 33], window)


@pytest.mark.parametrize("window", [0, 30, 300])
def test_prefill_of_more_keys_than_are_weighed_together(window: int) -> None:
    check_prefill(paged(Shape(kv_heads=1, dtype=BF16), [256, 257, 600]), [30, 2, 100], window)
    check_prefill(paged(Shape(kv_heads=1, dtype=BF16), [300]), [300], window)
