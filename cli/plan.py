"""``kvferry plan``: the pool ratio for an SLO, found by simulation, or the advice to have none."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.options import Attainment, SloTpot, SloTtft
from planner.outcome import Slo
from planner.plan import Plan, Planner
from planner.profile import PUBLISHED, WorkerProfile
from planner.search import Option
from planner.workload import Lengths, Request, generate, read_trace
from protocol.errors import ConfigError

TABLE_WIDTH = 110  # at least, also where nothing is known of the terminal


def plan(
    profile: Annotated[
        str,
        typer.Option(
            help="A worker's profile: a file of kvferry profile, or one of " + ", ".join(PUBLISHED)
        ),
    ],
    slo_ttft: SloTtft,
    slo_tpot: SloTpot,
    gpus: Annotated[int, typer.Option(help="Workers to place.", min=1)],
    trace: Annotated[
        Path | None, typer.Option(help="Requests: Mooncake's JSON lines or Azure's CSV.")
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Without a trace: mean prompt length.", min=1)
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(help="Without a trace: mean output length.", min=1)
    ] = None,
    variation: Annotated[
        float, typer.Option(help="Without a trace: coefficient of variation of lengths.", min=0)
    ] = 1.0,
    burstiness: Annotated[
        float, typer.Option(help="Without a trace: that of the gaps; 1 is Poisson.", min=0.01)
    ] = 1.0,
    attainment: Attainment = 0.9,
    requests: Annotated[
        int, typer.Option(help="Requests to simulate: the trace's first ones.", min=2)
    ] = 4000,
    slo_map: Annotated[
        bool, typer.Option(help="Also plan for half and twice each deadline.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
) -> None:
    """Find the pool ratio that carries the highest rate within an SLO."""
    slo = Slo(slo_ttft / 1e3, slo_tpot / 1e3, attainment)
    errors = Console(stderr=True)
    try:
        worker = WorkerProfile.load(profile)
        workload = _workload(trace, prompt_tokens, output_tokens, variation, burstiness, requests)
        with errors.status(f"simulating {len(workload)} requests at many rates"):
            found = Planner(workload, worker, gpus).plan(slo, with_map=slo_map)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    if as_json:
        sys.stdout.write(json.dumps(record(found), indent=1) + "\n")
    else:
        show(found)


def _workload(
    trace: Path | None,
    prompt_tokens: float | None,
    output_tokens: float | None,
    variation: float,
    burstiness: float,
    count: int,
) -> list[Request]:
    lengths = prompt_tokens, output_tokens
    if trace is not None:
        if lengths != (None, None):
            raise ConfigError("--trace has its own lengths: leave out --prompt-tokens and others")
        return read_trace(trace, count)
    if prompt_tokens is None or output_tokens is None:
        raise ConfigError("give --trace, or both --prompt-tokens and --output-tokens")
    prompt, output = Lengths(prompt_tokens, variation), Lengths(output_tokens, variation)
    drawn = generate(rate=1, count=count, prompt=prompt, output=output, burstiness=burstiness)
    return list(drawn)


def record(plan: Plan) -> dict[str, object]:
    """The plan as JSON: seconds, requests a second."""
    fields = asdict(plan)
    for cell, entry in zip(plan.slo_map, fields["slo_map"], strict=True):
        entry["ratio"] = cell.ratio
    return {"answer": plan.answer(), "disaggregate": plan.disaggregate, **fields}


def show(plan: Plan) -> None:
    """The plan in words and tables."""
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(plan.answer(), style="bold", highlight=False)
    if plan.checked is not None:
        console.print(f"Checked with the real schedulers: {plan.checked:.1%} keep both deadlines.")
    for note in plan.notes:
        console.print(f"Note: {note}.", highlight=False)
    columns = "requests/s", "per worker", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99"
    table = Table("placement", *columns, title="at each placement's goodput (ms)")
    for option in (*plan.ratios, *plan.variants, plan.colocated):
        style = "bold" if option.placement == plan.best.placement else ""
        table.add_row(str(option.placement), *_figures(option), style=style)
    console.print(table)
    if plan.slo_map:
        console.print(_map_table(plan))


def _figures(option: Option) -> list[str]:
    names = [f"{name}_p{percent}" for name in ("ttft", "tpot") for percent in (50, 90, 99)]
    times = [f"{option.figures[name] * 1e3:.1f}" if option.figures else "-" for name in names]
    each = option.goodput / option.placement.num_workers
    return [f"{option.goodput:.2f}", f"{each:.2f}", *times]


def _map_table(plan: Plan) -> Table:
    tpots = sorted({cell.tpot for cell in plan.slo_map})
    columns = [f"TPOT {tpot * 1e3:g} ms" for tpot in tpots]
    table = Table("", *columns, title="best pools / colocated goodput, and the pools' prefill part")
    for ttft in sorted({cell.ttft for cell in plan.slo_map}):
        row = sorted((c for c in plan.slo_map if c.ttft == ttft), key=lambda cell: cell.tpot)
        texts = [_cell(cell.disaggregated, cell.ratio, cell.prefill) for cell in row]
        table.add_row(f"TTFT {ttft * 1e3:g} ms", *texts)
    return table


def _cell(disaggregated: float, ratio: float | None, prefill: int) -> str:
    if ratio is None:
        return f"only pools, {prefill}P" if disaggregated else "neither"
    return f"{ratio:.2f}, {prefill}P" if disaggregated else "only colocated"
