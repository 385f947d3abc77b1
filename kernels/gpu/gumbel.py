"""Gumbel noise inside a kernel; ``kernels.gumbel`` defines it."""

from __future__ import annotations

import triton.language as tl

from kernels.gpu.language import Scalar, Tile, kernel
from kernels.gpu.splitmix import INCREMENT, mix


@kernel()
def noise_key(seed: Scalar, position: Scalar) -> Scalar:
    """What all noise of one row has in common, from int64."""
    return mix(mix(seed.to(tl.uint64) + (position.to(tl.uint64) + 1) * INCREMENT))


@kernel()
def gumbel_noise(key: Scalar, columns: Tile) -> Tile:
    """Float32, of vocabulary indices, for a row's key."""
    bits = mix(key + (columns + 1).to(tl.uint64) * INCREMENT) >> 12
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
    return (-tl.log(-tl.log(uniform))).to(tl.float32)
