"""The finaliser and increment of splitmix64 (Steele, Lea and Flood 2014) in a kernel."""

from __future__ import annotations

import triton.language as tl

from kernels.gpu.language import Tile, kernel

INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)


@kernel()
def mix(x: Tile) -> Tile:
    """``x`` is uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
