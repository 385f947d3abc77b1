"""Check every Triton kernel on this machine's GPU, then time it.

    python -m bench.gpu

Kernels are compared with their torch twins in float32, then timed next to what the machine does
in the same run: a large device copy and a bf16 matrix product. A figure is the median of 20 runs,
each after its data has left the cache; operations that never wait for the host run as a graph.
Ends with 0 when all kernels are right, 1 when one is not, 2 when there is no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console

from bench.gpu import (
    blocks,
    decode_attention,
    elementwise,
    prefill_attention,
    rotate_and_write,
    sampling,
    wire_quantization,
)
from bench.gpu.report import Report
from bench.gpu.run import run_cases, run_checks
from bench.gpu.timing import Timer

MODULES = (
    decode_attention,
    prefill_attention,
    elementwise,
    rotate_and_write,
    sampling,
    blocks,
    wire_quantization,
)
RESULTS = Path(__file__).parent.parent / "results"

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def gpu(
    name: Annotated[str, typer.Option(help="Of the file, bench/results/gpu-NAME.json.")] = "",
    only: Annotated[str, typer.Option(help="Time the cases whose names contain this.")] = "",
    seconds: Annotated[float, typer.Option(help="After which no case is begun.")] = 360,
) -> None:
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise typer.Exit(2)
    device = torch.device("cuda")
    torch.manual_seed(0)
    report = Report(
        torch.cuda.get_device_name(), {"torch": torch.__version__, "triton": triton.__version__}
    )
    path = RESULTS / f"gpu-{name or report.device.lower().replace(' ', '-')}.json"
    console = Console()

    def progress(done: str) -> None:
        report.write(path)
        console.print(f"[dim]{done}[/]")

    right = run_checks(report, [check for module in MODULES for check in module.CHECKS], device)
    for check, outcome in report.checks.items():
        if isinstance(outcome, str):
            console.print(f"[red]wrong[/] {check}: {outcome}")
    progress(f"{len(report.checks)} checks")
    cases = [case for module in MODULES for case in module.CASES if only in case.name]
    run_cases(report, cases, Timer(), seconds, progress)
    report.write(path)
    console.print(report.table())
    console.print(f"-> {path}")
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    app()
