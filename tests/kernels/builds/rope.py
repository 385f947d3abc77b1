"""Rotary embedding."""

from __future__ import annotations

from kernels.gpu.rope import rope_kernel
from tests.kernels.compilation import Build

BUILDS = {
    "32 and 8 heads of 128": Build(
        rope_kernel,
        dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"},
        {"Q_HEADS": 32, "Q_PADDED": 32, "K_HEADS": 8, "K_PADDED": 8}
        | {"HALF": 64, "HALF_PADDED": 64, "UPCAST": False},
    ),
}
