"""The weights of the block digest inside a kernel; ``kernels.digest`` defines them."""

from __future__ import annotations

import triton.language as tl

from kernels.gpu.language import Tile, kernel
from kernels.gpu.splitmix import INCREMENT, mix

GROUP = tl.constexpr(256)  # lanes


@kernel()
def in_group_weights(lanes: Tile) -> Tile:
    """Of lanes by their number within their group, uint64."""
    return mix((lanes + 1).to(tl.uint64) * INCREMENT) | 1


@kernel()
def group_weights(groups: Tile) -> Tile:
    """Of groups by their number within the row, uint64."""
    return mix((groups + GROUP + 1).to(tl.uint64) * INCREMENT) | 1
