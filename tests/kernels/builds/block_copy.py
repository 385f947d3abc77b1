"""Whole-block copies with their digests."""

from __future__ import annotations

from kernels.gpu.block_copy import GROUPS, block_copy_kernel
from tests.kernels.compilation import Build

POINTERS = ("source", "source_ids", "target", "target_ids", "sums")

BUILDS = {
    "gather": Build(
        block_copy_kernel,
        dict.fromkeys(POINTERS, "*i64"),
        {"N": 1 << 18, "GROUPS": GROUPS}
        | {"INDIRECT_SOURCE": True, "COPY": True, "INDIRECT_TARGET": False},
    ),
}
