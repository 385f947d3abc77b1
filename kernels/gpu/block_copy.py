"""Whole-block copies with their digests: a program moves 16 KiB of a block and sums it on the way.

``kernels.digest`` defines the digest. Lanes are 64 bits wide, 256 to a group; torch adds up the
programs' sums.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.digest import GROUP, group_weights, in_group_weights
from kernels.gpu.language import Pointer, kernel

GROUPS = 8  # of a program


@kernel()
def block_copy_kernel(
    source: Pointer,  # int64 [source blocks, N]
    source_ids: Pointer,  # int64 [count], or nothing when not INDIRECT_SOURCE
    target: Pointer,  # int64 [target blocks, N], or nothing when not COPY
    target_ids: Pointer,  # int64 [count], or nothing when not INDIRECT_TARGET
    sums: Pointer,  # int64 [count, programs of a block]
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    INDIRECT_SOURCE: tl.constexpr,
    COPY: tl.constexpr,
    INDIRECT_TARGET: tl.constexpr,
) -> None:
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = part * GROUPS + tl.arange(0, GROUPS)
    in_group = tl.arange(0, GROUP)
    lanes = groups[:, None] * GROUP + in_group[None, :]
    inside = lanes < N
    start = index
    if INDIRECT_SOURCE:
        start = tl.load(source_ids + index)
    values = tl.load(source + start * N + lanes, mask=inside, other=0)
    if COPY:
        end = index
        if INDIRECT_TARGET:
            end = tl.load(target_ids + index)
        tl.store(target + end * N + lanes, values, mask=inside)
    group_sums = tl.sum(values.to(tl.uint64) * in_group_weights(in_group)[None, :], axis=1)
    total = tl.sum(group_sums * group_weights(groups), axis=0)
    tl.store(sums + index * tl.num_programs(1) + part, total.to(tl.int64))


def gather_blocks_triton(rows: Tensor, block_ids: Sequence[int], out: Tensor) -> list[int]:
    """``kernels.block_copy.gather_blocks`` on a GPU; waits for the result."""
    return _launch(rows, block_ids, target=out)


def scatter_blocks_triton(source: Tensor, block_ids: Sequence[int], rows: Tensor) -> list[int]:
    """``kernels.block_copy.scatter_blocks`` on a GPU; waits for the result."""
    return _launch(source, block_ids, target=rows, scatter=True)


def digest_blocks_triton(rows: Tensor, block_ids: Sequence[int]) -> list[int]:
    """``kernels.digest.digest_blocks`` on a GPU; waits for the result."""
    return _launch(rows, block_ids, target=None)


def _launch(
    source: Tensor, block_ids: Sequence[int], target: Tensor | None, *, scatter: bool = False
) -> list[int]:
    """Copy to ``target``, if there is one; ``block_ids`` are the source's, or the scatter's."""
    if not block_ids:
        return []
    lanes = source.view(torch.int64)
    ids = torch.tensor(block_ids, dtype=torch.int64).to(source.device)
    grid = (len(block_ids), triton.cdiv(lanes.shape[1], GROUPS * GROUP.value))
    sums = torch.empty(grid, dtype=torch.int64, device=source.device)
    block_copy_kernel[grid](
        lanes,
        ids,
        lanes if target is None else target.view(torch.int64),
        ids,
        sums,
        N=lanes.shape[1],
        GROUPS=GROUPS,
        INDIRECT_SOURCE=not scatter,
        COPY=target is not None,
        INDIRECT_TARGET=scatter,
    )
    return [digest % (1 << 64) for digest in sums.sum(1).tolist()]
