"""KV writes: what lies beside their targets stays, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.implementation import write_kv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN tensor inside a NaN buffer: the buffer, and the tensor as a view of it."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 128,), torch.nan, dtype=dtype)
    return buffer, buffer[64:-64].view(shape)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(2, 32, 16), (3, 80, 64)])
def test_write_kv(dtype: torch.dtype, heads: int, head_dim: int, block_size: int) -> None:
    buffer, arena = guarded((5, heads, 3, 2, block_size, head_dim), dtype)
    expected_buffer = buffer.clone()
    expected = expected_buffer[64:-64].view(arena.shape)
    fused = torch.randn(6, 3 * heads, head_dim).to(dtype)
    k, v = fused[:, heads : 2 * heads], fused[:, 2 * heads :]  # not contiguous
    blocks, offsets = [0, 4, 2, 2, 4, 1], [0, block_size - 1, 5, 6, 0, 1]
    slots = [block * block_size + offset for block, offset in zip(blocks, offsets, strict=True)]
    write_kv(k, v, arena[:, :, 1], torch.tensor(slots))
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        for head in range(heads):
            expected[block, head, 1, 0, offset] = k[token, head]
            expected[block, head, 1, 1, offset] = v[token, head]
    assert torch.equal(bits(buffer), bits(expected_buffer))


def test_write_kv_of_no_tokens() -> None:
    arena = torch.zeros(2, 1, 1, 2, 16, 32)
    empty = torch.empty(0, 1, 32)
    write_kv(empty, empty, arena[:, :, 0], torch.empty(0, dtype=torch.int64))
    assert (arena == 0).all()
