"""QK-norm, rotary embedding and KV write against float64; nothing beside the slots changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_close
from tests.kernels.implementation import rotate_and_write
from tests.kernels.poison import unchanged, uninitialized_is_nan

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-5
BLOCKS, LAYERS, LAYER = 5, 3, 1
WHERE = [(0, 0), (4, -1), (2, 5), (2, 6), (4, 0), (1, 1)]  # block and offset of each token
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def turned(heads: Tensor, norm: Tensor | None, angles: Tensor) -> Tensor:
    """In float64. A pair (first half, second half) is a complex number, turned by its angle."""
    heads = heads.double()
    if norm is not None:
        heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    pairs = torch.complex(*heads.chunk(2, dim=-1))
    pairs = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@dtypes
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 2, 32, 16), (7, 1, 80, 64), (18, 9, 128, 16), (3, 3, 96, 8)],
)
def test_queries_keys_and_values(
    dtype: torch.dtype, normalised: bool, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    projected = normal(len(WHERE), heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = projected.split([heads, kv_heads, kv_heads], dim=1)
    q_norm, k_norm = (normal(2, head_dim) + 1).to(dtype) if normalised else (None, None)
    angles = normal(len(WHERE), head_dim // 2) * 3
    shape = (BLOCKS, kv_heads, LAYERS, 2, block_size, head_dim)
    buffer = torch.full((torch.Size(shape).numel() + 128,), torch.nan, dtype=dtype)
    kv = buffer[64:-64].view(shape)[:, :, LAYER]
    blocks, offsets = torch.tensor(WHERE).unbind(1)
    offsets %= block_size
    slots = blocks * block_size + offsets

    with unchanged(buffer), unchanged(projected):
        with uninitialized_is_nan():
            rotated = rotate_and_write(
                projected.flatten(1), q_norm, k_norm, EPS, angles.cos(), angles.sin(), kv, slots
            )
        written = kv[blocks, :, :, offsets]  # [tokens, kv heads, 2, head_dim]
        kv[blocks, :, :, offsets] = torch.nan
    assert rotated.is_contiguous()
    assert_close(rotated, turned(q, q_norm, angles))
    assert_close(written[:, :, 0], turned(k, k_norm, angles))
    assert torch.equal(written[:, :, 1], v)


@dtypes
def test_the_norm_is_rounded_before_the_weight_and_before_the_turn(dtype: torch.dtype) -> None:
    projected, angles = normal(3, 3 * 64).to(dtype), normal(3, 32)
    slots, weight, one = torch.arange(3), normal(64).to(dtype), torch.ones(64, dtype=dtype)

    def queries(norm: Tensor, angles: Tensor) -> Tensor:
        kv = torch.empty(1, 1, 2, 16, 64, dtype=dtype)
        cos, sin = angles.cos(), angles.sin()
        return rotate_and_write(projected, norm, norm, EPS, cos, sin, kv, slots)

    unit = queries(one, torch.zeros_like(angles))
    weighted = queries(weight, torch.zeros_like(angles))
    assert torch.equal(weighted, (unit.double() * weight.double()).to(dtype))
    assert_close(queries(weight, angles), turned(weighted, None, angles))


def test_norms_of_small_values_use_eps() -> None:
    projected, angles = normal(1, 3 * 64) * 1e-4, normal(1, 32)
    kv, norm = torch.empty(1, 1, 2, 16, 64), normal(64)
    cos, sin, slots = angles.cos(), angles.sin(), torch.tensor([7])
    rotated = rotate_and_write(projected, norm, norm, EPS, cos, sin, kv, slots)
    assert_close(rotated, turned(projected[:, None, :64], norm, angles))


def test_no_tokens() -> None:
    arena = torch.zeros(2, 1, 2, 16, 32)
    cos, slots = torch.empty(0, 16), torch.empty(0, dtype=torch.int64)
    rotated = rotate_and_write(torch.empty(0, 4 * 32), None, None, EPS, cos, cos, arena, slots)
    assert rotated.shape == (0, 2, 32)
    assert (arena == 0).all()
