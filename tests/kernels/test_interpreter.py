"""Runs this folder's tests again, on the Triton kernels, in Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so the interpreter has a process of its
own, and no other process inherits the variable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
OPERATIONS = (
    "attention_metadata block_copy decode_attention decode_bucket digest elementwise "
    "prefill_attention rotate_and_write sampling wire_quantization"
)


def test_kernels_pass_the_same_tests_as_their_twins() -> None:
    files = [FOLDER / f"test_{name}.py" for name in OPERATIONS.split()]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=FOLDER.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
