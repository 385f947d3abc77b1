"""Linear layers of packed and quantised weights, and the rows an embedding takes out of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear import (
    PackedWeight,
    QuantizedWeight,
    embedding,
    linear,
    linear_torch,
    pack,
    quantize,
)
from tests.kernels.accuracy import BOUNDS, assert_close
from tests.kernels.implementation import without_compiler
from tests.kernels.poison import unchanged, uninitialized_is_nan

BF16 = torch.bfloat16
# Whole panels of 32 outputs and vectors of 16 words, and neither.
SHAPES = [(64, 96), (32, 64), (100, 36), (37, 200), (1, 4)]
ROWS = [1, 2, 4, 5, 14, 15, 29, 100]  # one row, one tile, several of two heights

shapes = pytest.mark.parametrize(("outputs", "inputs"), SHAPES)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed(weight: Tensor) -> PackedWeight:
    result = pack(weight.clone())
    if not isinstance(result, PackedWeight):
        pytest.skip("this machine computes with weights as they are")
    return result


@pytest.mark.parametrize("multiply", [linear, linear_torch])
@pytest.mark.parametrize("biased", [False, True])
@shapes
def test_products(multiply: Callable[..., Tensor], biased: bool, outputs: int, inputs: int) -> None:
    weight = normal(outputs, inputs, dtype=BF16)
    bias = normal(outputs, dtype=BF16)
    for rows in ROWS:
        buffer = normal(rows, inputs + 8, dtype=BF16)
        x = buffer[:, 4:-4]  # rows lie apart, at odd places
        with unchanged(buffer), uninitialized_is_nan():
            result = multiply(x, packed(weight), bias if biased else None)
        assert result.dtype == BF16
        assert_close(result, x.double() @ weight.double().T + (bias.double() if biased else 0))


def test_no_rows() -> None:
    weight = packed(normal(64, 96, dtype=BF16))
    assert linear(torch.empty(0, 96, dtype=BF16), weight).shape == (0, 64)


@shapes
def test_a_row_does_not_depend_on_the_others(outputs: int, inputs: int) -> None:
    weight = packed(normal(outputs, inputs, dtype=BF16))
    x = normal(600, inputs, dtype=BF16)  # more rows than stay in the cache together
    together = linear(x, weight)
    for first, count in ((0, 1), (599, 1), (250, 3), (14, 16), (500, 100)):
        part = slice(first, first + count)
        assert torch.equal(linear(x[part], weight), together[part])


@shapes
def test_packing_keeps_the_rows(outputs: int, inputs: int) -> None:
    weight = normal(outputs, inputs, dtype=BF16)
    ids = torch.tensor([outputs - 1, 0, outputs // 2, 0])
    assert torch.equal(embedding(ids, packed(weight)), weight[ids])


def test_packing_uses_the_weights_own_memory() -> None:
    weight = normal(96, 64, dtype=BF16)
    result = pack(weight)
    if isinstance(result, PackedWeight):
        assert result.panels.data_ptr() == weight.data_ptr()


def test_what_cannot_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (normal(64, 32), normal(64, 32).half(), normal(64, 33, dtype=BF16)):
        assert pack(weight) is weight
    without_compiler(monkeypatch)
    weight = normal(64, 32, dtype=BF16)
    assert pack(weight) is weight


class TestQuantized:
    @shapes
    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    @pytest.mark.usefixtures("implementation")
    def test_products_of_integers(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        """Whole numbers up to 127, that one included in every row, quantise to themselves."""
        random = torch.Generator().manual_seed(outputs)
        weight = torch.randint(-127, 128, (outputs, inputs), generator=random).float()
        bias = normal(outputs, dtype=dtype)
        weight[:, 0] = 127
        for rows in ROWS:
            x = torch.randint(-127, 128, (rows, inputs), generator=random).to(dtype)
            x[:, -1] = -127
            expected = x.double() @ weight.double().T
            with uninitialized_is_nan():
                assert torch.equal(linear(x, quantize(weight)), expected.to(dtype))
                biased = linear(x, quantize(weight), bias)
            assert_close(biased, expected + bias.double())

    @shapes
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
    def test_error(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        weight, x = normal(outputs, inputs, dtype=dtype), normal(20, inputs, dtype=dtype)
        exact = x.double() @ weight.double().T
        quantised = quantize(weight)
        result, twin = linear(x, quantised), linear_torch(x, quantised)
        assert (result.double() - exact).norm() / exact.norm() < 0.02
        assert (result.double() - twin.double()).norm() / exact.norm() < BOUNDS[dtype]

    @pytest.mark.usefixtures("implementation")
    def test_rows_of_zeros(self) -> None:
        weight, x = normal(40, 64), normal(3, 64)
        weight[7], x[1] = 0, 0
        result = linear(x, quantize(weight))
        assert (result[:, 7] == 0).all()
        assert (result[1] == 0).all()

    @shapes
    def test_rows_for_an_embedding(self, outputs: int, inputs: int) -> None:
        weight = normal(outputs, inputs, dtype=BF16)
        ids = torch.tensor([outputs - 1, 0])
        rows = embedding(ids, quantize(weight))
        assert rows.dtype == BF16
        # Half a step of the row's scale, and the rounding to bf16.
        bound = weight[ids].abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-8)
        assert ((rows - weight[ids]).abs() <= bound).all()

    def test_inputs_must_be_words(self) -> None:
        with pytest.raises(ValueError, match="38 inputs cannot be quantised"):
            quantize(normal(8, 38))

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        weight: QuantizedWeight = quantize(normal(64, 96))
        x = normal(40, 96)
        together = linear(x, weight)
        assert torch.equal(linear(x[17:18], weight), together[17:18])
