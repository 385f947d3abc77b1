"""Gumbel noise: one program per row and run of the vocabulary."""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.language import Pointer, Scalar, kernel
from kernels.gpu.splitmix import INCREMENT, mix

COLUMNS = 1024  # of a program


@kernel(do_not_specialize=["vocab_size"])
def gumbel_kernel(
    seeds: Pointer,  # int64 [rows]
    positions: Pointer,  # int64 [rows]
    out: Pointer,  # float32 [rows, vocab_size]
    vocab_size: Scalar,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seed = tl.load(seeds + row).to(tl.uint64)
    position = tl.load(positions + row).to(tl.uint64)
    key = mix(mix(seed + (position + 1) * INCREMENT))
    bits = mix(key + (columns + 1).to(tl.uint64) * INCREMENT) >> 12
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
    noise = -tl.log(-tl.log(uniform))
    tl.store(out + row * vocab_size + columns, noise.to(tl.float32), mask=columns < vocab_size)


def gumbel_noise_triton(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """``kernels.gumbel.gumbel_noise`` on a GPU."""
    out = torch.empty((len(seeds), vocab_size), dtype=torch.float32, device=seeds.device)
    if out.numel():
        grid = (len(seeds), triton.cdiv(vocab_size, COLUMNS))
        gumbel_kernel[grid](
            seeds.contiguous(), positions.contiguous(), out, vocab_size, COLUMNS=COLUMNS
        )
    return out
