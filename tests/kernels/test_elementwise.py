"""Normalisation and gate against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_close
from tests.kernels.implementation import add_rms_norm, rms_norm, silu_mul

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-5
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@dtypes
@pytest.mark.parametrize("n", [64, 96, 1000])
def test_rms_norm(dtype: torch.dtype, n: int) -> None:
    x, weight = normal(5, 2 * n).to(dtype)[:, :n], normal(n).to(dtype)
    assert_close(rms_norm(x, weight, EPS), reference_norm(x, weight))


def test_rms_norm_of_small_values_uses_eps() -> None:
    x, weight = normal(3, 64) * 1e-4, normal(64)
    assert_close(rms_norm(x, weight, EPS), reference_norm(x, weight))


@dtypes
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (normal(*s).to(dtype) for s in ((5, 96), (5, 97), (96,)))
    residual = residual[:, :96]
    kept = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, (x.double() + residual.double()).to(dtype))
    assert_close(normed, reference_norm(total, weight))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_the_norm_is_rounded_before_the_weight() -> None:
    x, weight = normal(4, 128).half(), normal(128).half()
    unit = rms_norm(x, torch.ones(128).half(), EPS)
    expected = (unit.double() * weight.double()).half()
    assert torch.equal(rms_norm(x, weight, EPS), expected)


@dtypes
@pytest.mark.parametrize("inter", [48, 1500])
def test_silu_mul(dtype: torch.dtype, inter: int) -> None:
    gate_up = (normal(3, 2 * inter) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, as it should
def test_silu_mul_far_from_zero() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(silu_mul(gate_up), torch.tensor([[0.0, 200.0, 0.0, 0.0]]))
    assert silu_mul(gate_up).isfinite().all()


def test_no_tokens() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
    assert silu_mul(torch.empty(0, 64)).shape == (0, 32)
