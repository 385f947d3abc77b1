"""Decode and prefill attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.decode_attention import (
    PARTS,
    PROGRAMS_PER_SM,
    combine_kernel,
    decode_attention_kernel,
    decode_constants,
)
from kernels.gpu.prefill_attention import prefill_attention_kernel, prefill_constants
from tests.kernels.compilation import Build

KV_HEADS = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def decode(group: int, head_dim: int, block_size: int, dtype: str = "bf16") -> Build:
    constants = decode_constants(group * KV_HEADS, layer(block_size, head_dim, dtype))
    return Build(
        decode_attention_kernel,
        dict.fromkeys(("q", "kv", "out"), f"*{dtype}")
        | dict.fromkeys(("block_tables", "items", "num_items"), "*i32")
        | {"parts": "*fp32", "part_sums": "*fp32", "scale": "fp32"},
        num_warps=constants.pop("num_warps"),
        num_stages=constants.pop("num_stages"),
        constants=constants,
        programs_per_sm=PROGRAMS_PER_SM[constants["DIM_PADDED"]] if dtype == "bf16" else 1,
    )


def prefill(
    group: int, head_dim: int, block_size: int, window: int = 0, dtype: str = "bf16"
) -> Build:
    constants = prefill_constants(group * KV_HEADS, layer(block_size, head_dim, dtype), window)
    return Build(
        prefill_attention_kernel,
        dict.fromkeys(("q", "kv", "out"), f"*{dtype}")
        | dict.fromkeys(("block_tables", "tiles", "query_starts", "contexts"), "*i32")
        | {"scale": "fp32"},
        num_warps=constants.pop("num_warps"),
        num_stages=constants.pop("num_stages"),
        constants=constants,
        wgmma=dtype == "bf16",
    )


def layer(block_size: int, head_dim: int, dtype: str) -> Tensor:
    """One layer's view of an arena without blocks."""
    return torch.empty((0, KV_HEADS, 2, block_size, head_dim), dtype=DTYPES[dtype])


BUILDS = {
    f"decode: group {group}, head_dim {head_dim}, blocks of {block_size}": decode(
        group, head_dim, block_size
    )
    for group, head_dim, block_size in [
        (1, 64, 16),
        (1, 128, 64),
        (4, 96, 16),
        (4, 128, 16),
        (4, 128, 64),
        (4, 128, 128),
        (8, 64, 64),
        (8, 256, 64),
        (16, 128, 64),
        (16, 256, 16),
    ]
}
BUILDS["decode: group 4, head_dim 128, blocks of 64, float32"] = decode(4, 128, 64, "fp32")
BUILDS["decode: group 8, head_dim 256, blocks of 16, float32"] = decode(8, 256, 16, "fp32")
BUILDS |= {
    f"prefill: group {group}, head_dim {head_dim}, blocks of {block_size}, window {window}": (
        prefill(group, head_dim, block_size, window)
    )
    for group, head_dim, block_size, window in [
        (1, 64, 64, 0),
        (1, 128, 128, 0),
        (4, 80, 16, 0),
        (4, 128, 16, 0),
        (4, 128, 64, 0),
        (4, 128, 64, 1024),
        (8, 64, 16, 128),
        (8, 128, 128, 4096),
        (8, 256, 64, 0),
        (16, 256, 64, 1024),
    ]
}
BUILDS["prefill: group 4, head_dim 128, blocks of 64, float32"] = prefill(4, 128, 64, dtype="fp32")
BUILDS["combination: head_dim 128"] = Build(
    combine_kernel,
    {"parts": "*fp32", "part_sums": "*fp32", "row_starts": "*i32", "out": "*bf16"},
    {"HEAD_DIM": 128, "DIM_PADDED": 128, "PARTS": PARTS, "UPCAST": False},
)
