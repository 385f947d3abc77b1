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
    from kernels.gpu.prefill_attention import prefill_attention_triton as prefill_attention
    from kernels.gpu.rms_norm import add_rms_norm_triton as add_rms_norm
    from kernels.gpu.rms_norm import rms_norm_triton as rms_norm
    from kernels.gpu.rotate_and_write import rotate_and_write_triton as rotate_and_write
    from kernels.gpu.sampling import sample_tokens_triton as sample_tokens
    from kernels.gpu.silu_mul import silu_mul_triton as silu_mul
    from kernels.gpu.wire_quantization import dequantize_blocks_triton as dequantize_blocks
    from kernels.gpu.wire_quantization import quantize_blocks_triton as quantize_blocks
else:
    from kernels.block_copy import gather_blocks, scatter_blocks
    from kernels.decode_attention import decode_attention
    from kernels.digest import digest_blocks
    from kernels.prefill_attention import prefill_attention
    from kernels.rms_norm import add_rms_norm, rms_norm
    from kernels.rotate_and_write import rotate_and_write
    from kernels.sampling import sample_tokens
    from kernels.silu_mul import silu_mul
    from kernels.wire_quantization import dequantize_blocks, quantize_blocks


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the public functions run their torch twins."""
    monkeypatch.setattr(library, "load", lambda: None)


__all__ = [
    "INTERPRETED",
    "add_rms_norm",
    "decode_attention",
    "dequantize_blocks",
    "digest_blocks",
    "gather_blocks",
    "prefill_attention",
    "quantize_blocks",
    "rms_norm",
    "rotate_and_write",
    "sample_tokens",
    "scatter_blocks",
    "silu_mul",
    "without_compiler",
]
