"""Packing KV blocks into 8 bits and back, their digests included."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.case import Case, Check, Operation, Timed
from kernels.gpu.wire_quantization import dequantize_blocks_triton, quantize_blocks_triton
from kernels.wire_quantization import (
    Format,
    PackedLayout,
    dequantize_blocks_torch,
    quantize_blocks_torch,
)

TILES, BLOCK_SIZE, HEAD_DIM = 8 * 32 * 2, 64, 128  # of an 8B model's blocks
BLOCKS, COUNT = 256, 128
IDS = [4, 0, 2]


def check(layout: PackedLayout, *, unpack: bool) -> Check:
    """Of what is packed, every byte; of what comes back, every element and the digests too."""

    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = torch.randn((6, layout.num_elements), device=device).to(dtype)
        packed = torch.empty((len(IDS), layout.row_bytes), dtype=torch.uint8)
        digests = quantize_blocks_torch(rows.cpu(), IDS, layout, packed)
        if unpack:
            result, expected = torch.zeros_like(rows), torch.zeros_like(rows, device="cpu")
            found = dequantize_blocks_triton(packed.to(device), IDS, layout, result)
            dequantize_blocks_torch(packed, IDS, layout, expected)
        else:
            result, expected = torch.empty_like(packed, device=device), packed
            found = quantize_blocks_triton(rows, IDS, layout, result)
        if found != digests:
            raise ValueError("a digest differs from its torch twin's")
        return result.float(), expected.to(device).float()

    name = "unpack from" if unpack else "pack into"
    return Check(f"{name} 8 bits, keys in {layout.keys}, head_dim {layout.head_dim}", run)


def case(name: str, keys: Format, *, unpack: bool) -> Case:
    def prepare() -> Timed:
        layout = PackedLayout(TILES, BLOCK_SIZE, HEAD_DIM, keys)
        rows = torch.randn((BLOCKS, layout.num_elements), dtype=torch.bfloat16, device="cuda")
        packed = torch.empty((COUNT, layout.row_bytes), dtype=torch.uint8, device="cuda")
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0))[:COUNT]
        ids, on_gpu = order.tolist(), order.cuda()
        quantize_blocks_triton(rows, ids, layout, packed)

        def ours() -> list[int]:
            if unpack:
                return dequantize_blocks_triton(packed, ids, layout, rows)
            return quantize_blocks_triton(rows, ids, layout, packed)

        def cast() -> Tensor:  # without scales or digests
            return rows.index_select(0, on_gpu).to(torch.float8_e4m3fn)

        num_bytes = COUNT * (layout.num_elements * rows.element_size() + layout.row_bytes)
        peers: dict[str, Operation] = {} if unpack else {"index_select and cast": cast}
        return Timed(ours, num_bytes, lambda: peers, captured=False)

    return Case(name, "copy", 0.80, prepare)


CHECKS = [
    check(layout, unpack=unpack)
    for layout in (PackedLayout(4, 16, 64, "int8"), PackedLayout(6, 8, 80, "e4m3"))
    for unpack in (False, True)
]
CASES = [
    case("pack 1 GiB into 8 bits, keys in e4m3", "e4m3", unpack=False),
    case("pack 1 GiB into 8 bits, keys in int8", "int8", unpack=False),
    case("unpack 1 GiB from 8 bits, keys in e4m3", "e4m3", unpack=True),
]
