"""QK-norm, rotary embedding and KV write."""

from __future__ import annotations

import torch

from kernels.gpu.rotate_and_write import rotate_and_write_kernel, rotation_constants
from tests.kernels.compilation import Build


def build(heads: int, kv_heads: int, head_dim: int, *, norm: bool) -> Build:
    layer = torch.empty((0, kv_heads, 2, 64, head_dim), dtype=torch.bfloat16)
    constants = rotation_constants(heads, layer, norm=norm)
    return Build(
        rotate_and_write_kernel,
        dict.fromkeys(("qkv", "q_norm", "k_norm", "q", "kv"), "*bf16")
        | {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32"},
        num_warps=constants.pop("num_warps"),
        constants=constants,
    )


BUILDS = {
    "14 and 2 heads of 64": build(14, 2, 64, norm=False),
    "32 and 8 heads of 128": build(32, 8, 128, norm=False),
    "16 and 8 heads of 128, normalised": build(16, 8, 128, norm=True),
    "32 and 32 heads of 96": build(32, 32, 96, norm=False),
}
