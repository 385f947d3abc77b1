"""Check every Triton kernel on this machine's GPU, time it, then serve an 8B model with it.

    python -m bench.gpu

Kernels are compared with their torch twins in float32, then timed next to what the machine does
in the same run: a large device copy and a bf16 matrix product. A figure is the median of 20 runs,
each after its data has left the cache; operations that never wait for the host run as a graph. How
the model is measured is told in bench/gpu/end_to_end.py. Ends with 0 when all kernels are right and
the model was measured, 1 otherwise, 2 when there is no GPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console

from bench.engine import Floors, floors_meter
from bench.gpu import (
    blocks,
    decode_attention,
    elementwise,
    prefill_attention,
    rotate_and_write,
    sampling,
    wire_quantization,
)
from bench.gpu.end_to_end import H200, TINY, Plan, run
from bench.gpu.report import Report
from bench.gpu.run import run_cases, run_checks
from bench.gpu.timing import Timer
from bench.peers.record import Record

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

console = Console()
app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def gpu(
    name: Annotated[str, typer.Option(help="Of the file, bench/results/gpu-NAME.json.")] = "",
    only: Annotated[str, typer.Option(help="Time the cases whose names contain this.")] = "",
    seconds: Annotated[float, typer.Option(help="After which no kernel's case is begun.")] = 240,
    end_to_end: Annotated[
        bool, typer.Option(help="Whether the 8B model is measured after the kernels.")
    ] = True,
    bound: Annotated[float, typer.Option(help="Seconds of each engine with it.")] = 120,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="That part alone, with a tiny model, on the CPU.")
    ] = False,
) -> None:
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            record = Record(Path(folder) / "figures.json", resume=False)
            done = _end_to_end(TINY, floors_meter(torch.bfloat16)(), record, bound)
        raise typer.Exit(0 if done else 1)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise typer.Exit(2)
    device = torch.device("cuda")
    torch.manual_seed(0)
    report = Report(
        torch.cuda.get_device_name(), {"torch": torch.__version__, "triton": triton.__version__}
    )
    path = RESULTS / f"gpu-{name or report.device.lower().replace(' ', '-')}.json"

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
    if end_to_end:
        torch.cuda.empty_cache()  # the next processes need it
        floors = Floors(report.ceilings["copy"], report.ceilings["matmul"])
        path = path.with_stem(f"{path.stem}-end-to-end")
        right &= _end_to_end(H200, floors, Record(path, resume=False), bound)
        console.print(f"-> {path}")
    raise typer.Exit(0 if right else 1)


def _end_to_end(plan: Plan, floors: Floors, record: Record, bound: float) -> bool:
    """Whether all of it could be measured."""
    with tempfile.TemporaryDirectory() as folder:
        run(plan, Path(folder), floors, record, bound, console)
    return not record.failures()


if __name__ == "__main__":
    app()
