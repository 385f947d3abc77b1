"""Makes what a kernel must not rely on, or must not touch, show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SAME_SIZE = {2: torch.int16, 4: torch.int32}


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` gives: outputs and scratch that nothing wrote are NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def unchanged(tensor: Tensor) -> Iterator[None]:
    """Assert that every bit of ``tensor``, NaN included, is at the end what it was."""
    bits = tensor.view(SAME_SIZE[tensor.element_size()])
    before = bits.clone()
    yield
    assert torch.equal(bits, before)
