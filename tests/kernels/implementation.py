"""The half of every operation that a test process checks.

The same tests run twice: in the suite's process on the torch twins, and in one child process that
``test_interpreter`` starts, with ``TRITON_INTERPRET=1`` set for it alone, on the Triton kernels.
Operations that also exist in C++ are tested through their public function, once with the library
and once as ``without_compiler``.
"""

from __future__ import annotations

import os

import pytest

from kernels.cpu import library

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from kernels.gpu.block_copy import digest_blocks_triton as digest_blocks
    from kernels.gpu.block_copy import gather_blocks_triton as gather_blocks
    from kernels.gpu.block_copy import scatter_blocks_triton as scatter_blocks
    from kernels.gpu.decode_attention import decode_attention_triton as decode_attention
    from kernels.gpu.gumbel import gumbel_noise_triton as gumbel_noise
    from kernels.gpu.prefill_attention import prefill_attention_triton as prefill_attention
    from kernels.gpu.rms_norm import add_rms_norm_triton as add_rms_norm
    from kernels.gpu.rms_norm import rms_norm_triton as rms_norm
    from kernels.gpu.rope import apply_rope_triton as apply_rope
    from kernels.gpu.silu_mul import silu_mul_triton as silu_mul
    from kernels.gpu.write_kv import write_kv_triton as write_kv
else:
    from kernels.block_copy import gather_blocks, scatter_blocks
    from kernels.decode_attention import decode_attention_torch as decode_attention
    from kernels.digest import digest_blocks
    from kernels.gumbel import gumbel_noise_torch as gumbel_noise
    from kernels.prefill_attention import prefill_attention_torch as prefill_attention
    from kernels.rms_norm import add_rms_norm_torch as add_rms_norm
    from kernels.rms_norm import rms_norm_torch as rms_norm
    from kernels.rope import apply_rope_torch as apply_rope
    from kernels.silu_mul import silu_mul_torch as silu_mul
    from kernels.write_kv import write_kv_torch as write_kv


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the public functions run their torch twins."""
    monkeypatch.setattr(library, "load", lambda: None)


__all__ = [
    "INTERPRETED",
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "digest_blocks",
    "gather_blocks",
    "gumbel_noise",
    "prefill_attention",
    "rms_norm",
    "scatter_blocks",
    "silu_mul",
    "without_compiler",
    "write_kv",
]
