"""KV write."""

from __future__ import annotations

from kernels.gpu.write_kv import write_kv_kernel
from tests.kernels.compilation import Build

BUILDS = {
    "8 heads of 128": Build(
        write_kv_kernel,
        {"k": "*bf16", "v": "*bf16", "kv": "*bf16", "slots": "*i64"},
        {"HEADS": 8, "HEADS_PADDED": 8, "HEAD_DIM": 128, "DIM_PADDED": 128, "BLOCK_SIZE": 64},
    ),
}
