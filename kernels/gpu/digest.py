"""Block digests: each program sums a run of a block's weighted lanes; torch adds the sums."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import Pointer, kernel
from kernels.gpu.splitmix import INCREMENT, mix

LANES = 2048  # of a program


@kernel()
def digest_kernel(
    rows: Pointer,  # int64 [blocks, N]
    block_ids: Pointer,  # int64 [count]
    sums: Pointer,  # int64 [count, programs of a block]
    N: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(block_ids + index)
    lanes = part * LANES + tl.arange(0, LANES)
    values = tl.load(rows + block * N + lanes, mask=lanes < N, other=0).to(tl.uint64)
    weights = mix((lanes + 1).to(tl.uint64) * INCREMENT) | 1
    total = tl.sum(values * weights, axis=0)
    tl.store(sums + index * tl.num_programs(1) + part, total.to(tl.int64))


def digest_blocks_triton(rows: Tensor, block_ids: Sequence[int]) -> list[int]:
    """``kernels.digest.digest_blocks`` on a GPU; waits for the result."""
    if not block_ids:
        return []
    lanes = rows.view(torch.int64)
    ids = torch.tensor(block_ids, dtype=torch.int64).to(rows.device)
    grid = (len(block_ids), triton.cdiv(lanes.shape[1], LANES))
    sums = torch.empty(grid, dtype=torch.int64, device=rows.device)
    digest_kernel[grid](lanes, ids, sums, N=lanes.shape[1], LANES=LANES)
    return [digest % (1 << 64) for digest in sums.sum(1).tolist()]
