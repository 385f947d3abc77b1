"""What is shown while a benchmark runs, and after it."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.serving.compare import LATENCIES, compare, differences
from bench.serving.measures import measure, warnings
from bench.serving.record import Record, Result, Run
from planner.outcome import Slo

REFRESHES = 2  # a second: drawing takes processor time from the measurement
RECENT = 200  # answers whose median TTFT is shown


class Watch:
    """A line that follows one run. Use as a context manager."""

    def __init__(self, console: Console, title: str, count: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=REFRESHES,
        )
        self._task = self._progress.add_task(title, total=count, state="")
        self._running = self._errors = 0
        self._ttfts: list[float] = []

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def sent(self) -> None:
        """A request is under way."""
        self._running += 1

    def done(self, result: Result) -> None:
        """One has ended."""
        self._running -= 1
        if result.error is None:
            self._ttfts = [*self._ttfts[-RECENT:], result.times[0]]
        else:
            self._errors += 1
        ttft = f"TTFT {np.median(self._ttfts) * 1e3:.0f} ms, " if self._ttfts else ""
        state = f"{ttft}{self._running} under way, {self._errors} failed"
        self._progress.update(self._task, advance=1, state=state)


def show_point(console: Console, run: Run, slo: Slo) -> None:
    """One line on a point of a sweep."""
    figures = measure(run, slo)
    console.print(
        f"{run.rate:8.3g} requests/s: {figures.attainment:6.1%} within the SLO, "
        f"TTFT p90 {figures.ttft.p90 * 1e3:.0f} ms, TPOT p90 {figures.tpot.p90 * 1e3:.1f} ms"
    )


def show(console: Console, record: Record) -> None:
    """The chosen run's figures, and what is to be doubted in them."""
    run, slo = record.chosen, record.slo
    figures = measure(run, slo)
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max")
    named = {"TTFT": figures.ttft, "TPOT": figures.tpot, "ITL": figures.itl, "E2E": figures.e2e}
    for name, values in {**named, "client lag": figures.lag}.items():
        table.add_row(name, *(f"{value * 1e3:.2f}" for value in asdict(values).values()))
    console.print(table)
    console.print(
        f"{figures.completed} of {figures.requests} requests in {figures.duration:.1f} s: "
        f"{figures.requests_per_s:.3g} requests/s, {figures.prompt_tokens_per_s:.0f} prompt and "
        f"{figures.output_tokens_per_s:.0f} output tokens/s"
    )
    console.print(
        f"goodput {figures.goodput:.3g} requests/s at TTFT {slo.ttft * 1e3:g} ms, "
        f"TPOT {slo.tpot * 1e3:g} ms ({figures.attainment:.1%} of requests, "
        f"{figures.deadline_attainment:.1%} of tokens on time)"
    )
    for kind, count in figures.errors.items():
        example = next(result.message for result in run.results if result.error == kind)
        console.print(f"{count} × {kind}: {example}", style="red", markup=False)
    for text in warnings(figures, run.client):
        console.print(f"warning: {text}", style="yellow", markup=False)
    if len(record.runs) > 1:
        knee = "no rate tried keeps" if record.knee is None else f"{record.knee:.3g} requests/s is"
        what = f"{slo.attainment:.0%} of requests within the SLO"
        rest = what if record.knee is None else f"the highest rate found with {what}"
        console.print(f"{knee} {rest}")


def show_comparison(console: Console, names: tuple[str, str], a: Record, b: Record) -> None:
    """Both records' chosen runs, figure by figure."""
    table = Table("", *names, "B/A", "95 % by chance", "")
    for row in compare(a, b):
        in_ms = row.name.split()[0] in LATENCIES
        left, right = (
            f"{value * 1e3:.4g} ms" if in_ms else f"{value:.4g}" for value in (row.a, row.b)
        )
        unknown = math.isnan(row.low + row.high)
        bounds = "" if unknown else f"{row.low:.3f} to {row.high:.3f}"
        verdict = "" if unknown else "differs" if row.differs else "within noise"
        table.add_row(row.name, left, right, f"{row.ratio:.3f}", bounds, verdict)
    console.print(table)
    for text in differences(a, b):
        console.print(f"not the same load: {text}", style="yellow", markup=False)
