"""Gumbel noise: it loads nothing but a row's seed and position."""

from __future__ import annotations

from kernels.gpu.gumbel import gumbel_kernel
from tests.kernels.compilation import Build

BUILDS = {
    "gumbel": Build(
        gumbel_kernel,
        {"seeds": "*i64", "positions": "*i64", "out": "*fp32"},
        {"COLUMNS": 1024},
        vector_loads=False,
    ),
}
