"""Gumbel noise as a pure function of (seed, position, vocabulary index): no generator state.

With m the finaliser of splitmix64 and c its increment, all in 64-bit integers:

    key  = m(m(seed + c * (position + 1)))
    bits = m(key + c * (index + 1))
    u    = (bits div 2^12 + 1/2) / 2^52     exactly representable, never 0 or 1
    noise = -log(-log u)                    in float64, rounded to float32

The bits are the same on every device. The logarithms differ between devices and between vector
lanes by some float64 rounding at most, which float32 shows about once in 2^28 values.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Independent standard Gumbel variables, float32 [rows, vocab_size], on the CPU.

    ``seeds`` and ``positions`` are int64 [rows]; a row depends on its own pair alone. On a GPU
    ``kernels.gpu.gumbel`` computes them where they are used.
    """
    # numpy for the bits: torch has no logical shift of 64-bit integers.
    increment = np.uint64(INCREMENT)
    counters = (positions.numpy().view(np.uint64) + np.uint64(1)) * increment
    keys = _mix(_mix(seeds.numpy().view(np.uint64) + counters))  # [rows]
    steps = np.arange(1, vocab_size + 1, dtype=np.uint64) * increment  # [vocab]
    bits = _mix(keys[:, None] + steps) >> np.uint64(12)
    uniform = torch.from_numpy(bits.view(np.int64)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    first, second = MULTIPLIERS
    x = (x ^ (x >> np.uint64(30))) * np.uint64(first)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(second)
    return x ^ (x >> np.uint64(31))
