"""What a kernel's module tells the benchmark: what to compare, and what to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Ceiling = Literal["copy", "matmul"]
Operation = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Check:
    """A kernel against its torch twin in float32: small enough for Triton's interpreter."""

    name: str
    run: Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]]  # result, expected


@dataclass(frozen=True, slots=True)
class Timed:
    """Operations on data of their own, and the least that they must do."""

    ours: Operation
    work: float  # bytes read and written, or floating-point operations
    peers: Callable[[], Mapping[str, Operation]] = dict  # that do the same; asked for once
    captured: bool = True  # in a graph, so that launching costs nothing


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    ceiling: Ceiling
    goal: float | None  # fraction of the ceiling; none for a variant that is only compared
    prepare: Callable[[], Timed]  # makes the data, on the GPU
