"""The package is ours, cheap to import, and does not get in the way of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.attention_metadata import AttentionMetadata
from kernels.backend import use_triton
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention
from tests.kernels.accuracy import assert_close
from tests.kernels.paged import Shape, dense_attention, paged, queries

ROOT = Path(__file__).parent.parent.parent


def python(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=200)


def test_transformers_imports_beside_it() -> None:
    python(f"""
import kernels
import transformers
from transformers import LlamaForCausalLM
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}, kernels.__file__
assert kernels.__version__ == "0.1.0"
""")


def test_a_worker_on_a_cpu_never_loads_triton() -> None:
    python("""
import sys
import torch
import kernels.attention_metadata, kernels.block_copy, kernels.decode_attention
import kernels.prefill_attention, kernels.rms_norm, kernels.rotate_and_write, kernels.sampling
from kernels.digest import digest_blocks
from kernels.silu_mul import silu_mul
silu_mul(torch.zeros(1, 8))
digest_blocks(torch.zeros(1, 8), [0])
assert "triton" not in sys.modules
""")


def test_cpu_tensors_run_on_the_twins() -> None:
    assert not use_triton(torch.zeros(1))


@pytest.mark.parametrize("window", [0, 9])
def test_public_attention_runs_on_the_cpu(window: int) -> None:
    cache = paged(Shape(), [20])
    q = queries(cache.shape, 4)
    meta = AttentionMetadata.build(cache.tables, [4], [20], "cpu")
    result = prefill_attention(q, cache.kv, meta, scale=0.2, window=window)
    assert_close(result, dense_attention(q, cache.rows[0], 0.2, window))
    last = decode_attention(q[3:], cache.kv, cache.metadata([1]), scale=0.2, window=window)
    assert_close(last, dense_attention(q[3:], cache.rows[0], 0.2, window))
