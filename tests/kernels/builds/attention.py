"""Decode and prefill attention."""

from __future__ import annotations

from kernels.gpu.decode_attention import combine_kernel, decode_attention_kernel
from kernels.gpu.prefill_attention import prefill_attention_kernel
from tests.kernels.compilation import Build

HEAD = {"HEAD_DIM": 128, "DIM_PADDED": 128}
QUERY_AND_KV = {"q": "*bf16", "kv": "*bf16", "block_tables": "*i32", "contexts": "*i32"}

BUILDS = {
    "decode": Build(
        decode_attention_kernel,
        QUERY_AND_KV
        | {"item_rows": "*i32", "item_starts": "*i32", "out": "*fp32", "peaks": "*fp32"}
        | {"totals": "*fp32", "scale": "fp32"},
        HEAD
        | {"WINDOW": 0, "GROUP": 4, "GROUP_PADDED": 16, "BLOCK_SIZE": 64}
        | {"CHUNK": 512, "TILE": 64, "SINGLE": False, "UPCAST": False},
    ),
    "combination": Build(
        combine_kernel,
        {"sums": "*fp32", "peaks": "*fp32", "totals": "*fp32", "row_starts": "*i32"}
        | {"out": "*bf16"},
        HEAD | {"UPCAST": False},
        vector_loads=False,
    ),
    "prefill": Build(
        prefill_attention_kernel,
        QUERY_AND_KV
        | {"query_starts": "*i32", "tile_rows": "*i32", "tile_starts": "*i32", "out": "*bf16"}
        | {"scale": "fp32"},
        HEAD
        | {"WINDOW": 0, "GROUP": 4, "BLOCK_SIZE": 64, "BLOCK_M": 128, "BLOCK_N": 64}
        | {"UPCAST": False},
        num_warps=8,
        num_stages=2,
        wgmma=True,
    ),
}
