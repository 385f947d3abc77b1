"""Packing and unpacking KV blocks, their digests included."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.case import Case, Check, Timed
from kernels.digest import digest_blocks_torch
from kernels.gpu.block_copy import gather_blocks_triton, scatter_blocks_triton

BLOCKS, ROW_BYTES, COUNT = 2048, 2 << 20, 512  # rows of an 8B model's blocks of 16 tokens


def check_gather(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = torch.randn((7, 520), device=device).to(dtype)
    ids = [6, 0, 3]
    out = torch.full((3, 520), torch.nan, dtype=dtype, device=device)
    digests = gather_blocks_triton(rows, ids, out)
    if digests != digest_blocks_torch(rows.cpu().view(torch.uint8), ids):
        raise ValueError("a digest differs from its torch twin's")
    return out, rows[ids].float()


def check_scatter(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.randn((3, 520), device=device).to(dtype)
    rows = torch.zeros((7, 520), dtype=dtype, device=device)
    scatter_blocks_triton(source, [6, 0, 3], rows)
    expected = torch.zeros((7, 520), device=device)
    expected[[6, 0, 3]] = source.float()
    return rows, expected


def case(name: str, *, scatter: bool) -> Case:
    def prepare() -> Timed:
        lanes = ROW_BYTES // 8
        rows = torch.randint(1 << 60, (BLOCKS, lanes), device="cuda")
        packed = torch.randint(1 << 60, (COUNT, lanes), device="cuda")
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0))[:COUNT]
        ids, on_gpu = order.tolist(), order.cuda()
        if scatter:
            ours = lambda: scatter_blocks_triton(packed, ids, rows)  # noqa: E731
            theirs = lambda: rows.index_copy_(0, on_gpu, packed)  # noqa: E731
        else:
            ours = lambda: gather_blocks_triton(rows, ids, packed)  # noqa: E731
            theirs = lambda: torch.index_select(rows, 0, on_gpu, out=packed)  # noqa: E731
        peer = "index_copy_" if scatter else "index_select"
        return Timed(ours, 2 * COUNT * ROW_BYTES, lambda: {peer: theirs}, captured=False)

    return Case(name, "copy", 0.85, prepare)


CHECKS = [Check("pack", check_gather), Check("unpack", check_scatter)]
CASES = [case("pack 1 GiB", scatter=False), case("unpack 1 GiB", scatter=True)]
