"""RMSNorm."""

from __future__ import annotations

from kernels.gpu.rms_norm import rms_norm_kernel
from tests.kernels.compilation import Build

BUILDS = {
    "add, 4096 columns": Build(
        rms_norm_kernel,
        dict.fromkeys(("x", "residual", "weight", "total", "out"), "*bf16") | {"eps": "fp32"},
        {"N": 4096, "PADDED": 4096, "ADD": True, "UPCAST": False},
        num_warps=8,
    ),
}
