"""How close a result must be to one computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(result: Tensor, expected: Tensor) -> None:
    """The relative error of the whole, in the 2-norm; NaN and infinity never pass."""
    assert result.shape == expected.shape
    assert result.isfinite().all()
    error = (result.double() - expected).norm() / expected.norm()
    assert error < BOUNDS[result.dtype], f"relative error {error:.2e}"
