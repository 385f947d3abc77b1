"""``bench.gpu`` without a GPU: checks run in Triton's interpreter, cases with a fake timer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.gpu.case import Case, Ceiling, Check, Operation, Timed
from bench.gpu.report import Report
from bench.gpu.run import run_cases, run_checks
from bench.gpu.timing import Timer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
RUN_CHECKS = """
import torch
from bench.gpu.__main__ import MODULES
from bench.gpu.report import Report
from bench.gpu.run import run_checks

report = Report("interpreter", {})
checks = [check for module in MODULES for check in module.CHECKS]
assert run_checks(report, checks, torch.device("cpu")), report.checks
"""


class FakeTimer(Timer):
    """Operations return the seconds they take."""

    def __init__(self) -> None:
        pass

    def seconds(self, operation: Operation, *, captured: bool = True) -> float:
        result = operation()
        assert isinstance(result, float)
        return result

    def ceilings(self) -> dict[Ceiling, float]:
        return {"copy": 4e12, "matmul": 8e14}


def fails() -> Timed:
    raise RuntimeError("out of memory\nsecond line")


def refuses() -> float:
    raise ValueError("unsupported")


CASES = [
    Case("good", "copy", 0.85, lambda: Timed(lambda: 1.0, 3.6e12, lambda: {"theirs": lambda: 3.0})),
    Case("lost", "matmul", 0.5, fails),
    Case("slow", "matmul", 0.5, lambda: Timed(lambda: 4.0, 8e14, lambda: {"no peer": refuses})),
]


def filled(seconds: float) -> Report:
    report = Report("device", {"torch": "2"})
    run_cases(report, CASES, FakeTimer(), seconds, lambda _: None)
    return report


def test_checks_pass_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN_CHECKS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "bench.gpu needs a CUDA GPU, and torch sees none\n"


def test_the_end_to_end_part_runs() -> None:
    """With a tiny model on the CPU: engines, transformers beside them, and the hand-off."""
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for row in ("kvferry", "transformers", "Hand-off: handoff_overhead"):
        assert row in result.stdout


def test_a_wrong_kernel_and_a_failing_one_are_reported() -> None:
    report = Report("device", {})
    exact = torch.ones(4)
    checks = [
        Check("right", lambda device, dtype: (exact, exact)),
        Check("wrong", lambda device, dtype: (exact * 1.1, exact)),
        Check("unwritten", lambda device, dtype: (exact * torch.nan, exact)),
        Check("failing", lambda device, dtype: (_ for _ in ()).throw(RuntimeError("no\nway"))),
    ]
    assert not run_checks(report, checks, CPU)
    assert report.checks["right, float16"] == 0.0
    assert report.checks["wrong, bfloat16"] == "relative error 1.0e-01"
    assert report.checks["unwritten, float16"] == "relative error inf"
    assert report.checks["failing, float16"] == "RuntimeError: no"


def test_ratios() -> None:
    good, lost, slow = filled(60).rows
    assert (good.fraction, good.peers) == (0.9, {"theirs": 3.0})
    assert lost.error == "RuntimeError: out of memory"
    assert (slow.fraction, slow.peers) == (0.25, {"no peer": "ValueError: unsupported"})


def test_out_of_time() -> None:
    assert [row.error for row in filled(-1).rows] == ["out of time"] * 3


def test_table_and_json(tmp_path: Path) -> None:
    report = filled(60)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    for word in (
        "copy 4000 GB/s",
        "3600 GB/s",
        "0.90",
        "theirs 3.00",
        "out of memory",
        "200 TFLOP",
    ):
        assert word in text
    path = tmp_path / "results" / "gpu-device.json"
    report.write(path)
    written = json.loads(path.read_text())
    assert written["rows"][0]["fraction"] == 0.9
    assert written["ceilings"] == {"copy": 4e12, "matmul": 8e14}
