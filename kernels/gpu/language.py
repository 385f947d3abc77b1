"""What all kernels share: the typed decorator, and rounding that is right in the interpreter too.

Triton's interpreter (``TRITON_INTERPRET=1``) computes bfloat16 wrongly and truncates where a GPU
rounds. So each kernel takes ``UPCAST``: when true, what it loads becomes float32 before any
arithmetic, and ``narrow`` rounds with integers before the type changes. It is false on a GPU.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# A kernel may only name what is Triton's own, in annotations too.
Pointer = tl.tensor  # of a tensor's first element
Scalar = tl.tensor  # an integer or a float
Tile = tl.tensor  # a block of values in registers

INTERPRETING: bool = triton.knobs.runtime.interpret
LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter, so that programs which take units in turn take several."""
    if INTERPRETING:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile of heads, at least a matrix unit's 16. ValueError above 256."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    return max(int(triton.next_power_of_2(head_dim)), 16)


def kernel(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``, typed. The named integers do not cause a compilation for a new value."""

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(do_not_specialize))

    return decorate


@kernel()
def widen(x: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """``x`` as it may enter arithmetic."""
    if UPCAST:
        return x.to(tl.float32)
    return x


@kernel()
def narrow(x: tl.tensor, TO: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """A float32 tile rounded to nearest even in type ``TO``."""
    if UPCAST and TO.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TO)
