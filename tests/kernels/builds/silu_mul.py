"""SwiGLU's gate."""

from __future__ import annotations

from kernels.gpu.silu_mul import silu_mul_kernel
from tests.kernels.compilation import Build

BUILDS = {
    "14336 columns": Build(
        silu_mul_kernel,
        {"gate_up": "*bf16", "out": "*bf16"},
        {"N": 14336, "COLUMNS": 1024, "UPCAST": False},
    ),
}
