"""KV blocks in 8 bits."""

from __future__ import annotations

from typing import Any

from kernels.gpu.wire_quantization import (
    dequantize_kernel,
    quantization_constants,
    quantize_kernel,
)
from kernels.wire_quantization import Format, PackedLayout
from tests.kernels.compilation import Build

TYPES = {"rows": "*bf16", "packed": "*i8", "packed_scales": "*fp32"}
TYPES |= dict.fromkeys(("block_ids", "packed_lanes", "sums"), "*i64")


def build(kernel: Any, block_size: int, head_dim: int, keys: Format) -> Build:
    layout = PackedLayout(8 * 32 * 2, block_size, head_dim, keys)
    constants = quantization_constants(layout)
    return Build(
        kernel,
        {name: type_ for name, type_ in TYPES.items() if name in kernel.arg_names},
        num_warps=constants.pop("num_warps"),
        enable_fp_fusion=constants.pop("enable_fp_fusion"),
        constants=constants,
    )


BUILDS = {
    "pack, e4m3 keys, head_dim 128": build(quantize_kernel, 64, 128, "e4m3"),
    "pack, int8 keys, head_dim 64, blocks of 16": build(quantize_kernel, 16, 64, "int8"),
    "unpack, e4m3 keys, head_dim 128": build(dequantize_kernel, 64, 128, "e4m3"),
    "unpack, int8 keys, head_dim 96, blocks of 16": build(dequantize_kernel, 16, 96, "int8"),
}
