"""Sampling."""

from __future__ import annotations

from kernels.gpu.sampling import NUM_WARPS, TILE, sample_kernel
from tests.kernels.compilation import Build

BUILDS = {
    f"{vocab_size} tokens": Build(
        sample_kernel,
        dict.fromkeys(("logits", "temperature", "top_p", "min_p"), "*fp32")
        | dict.fromkeys(("top_k", "seeds", "positions", "tokens"), "*i64"),
        {"N": vocab_size, "TILE": TILE},
        num_warps=NUM_WARPS,
    )
    for vocab_size in (128256, 151936)
}
