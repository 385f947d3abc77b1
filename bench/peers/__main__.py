"""kvferry beside its peers, in one run on one machine.

    python -m bench.peers install            # an environment for each peer; minutes, once
    python -m bench.peers engines MODEL      # decode and prefill rates, two threads each
    python -m bench.peers systems MODEL      # prefill and decode workers behind HTTP
    python -m bench.peers transfers          # KV between two processes

MODEL is a folder of bf16 safetensors, such as ``python -m bench.models FOLDER`` writes. Figures
are kept in bench/results as they come; ``--resume`` measures only what is missing there.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.peers import engines as engine_peers
from bench.peers import systems as system_peers
from bench.peers import transfers as transfer_peers
from bench.peers.compare import Peer, compare
from bench.peers.install import RECIPES, Site
from bench.peers.record import Record

RESULTS = Path(__file__).parents[1] / "results"

Venvs = Annotated[Path, typer.Option(help="Where the peers' environments are.")]
Only = Annotated[list[str] | None, typer.Option(help="Rows whose name begins so. Default: all.")]
Resume = Annotated[bool, typer.Option(help="Keep what was measured, add what is missing.")]
Out = Annotated[Path | None, typer.Option(help="The JSON file. Default: in bench/results.")]
Rounds = Annotated[int, typer.Option(help="Turns of all rows; figures are medians.", min=1)]
Model = Annotated[Path, typer.Argument(help="Folder with the model.", exists=True)]

VENVS = Path.home() / ".cache" / "kvferry" / "peers"

app = typer.Typer(add_completion=False, no_args_is_help=True, help="kvferry beside its peers.")
console = Console()


@app.command()
def install(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    venvs: Venvs = VENVS,
) -> None:
    """Make the peers' environments, one after the other."""
    unknown = set(names or ()) - set(RECIPES)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)}: the peers are {sorted(RECIPES)}")
    failed = []
    for name in names or RECIPES:
        console.print(f"[bold]{name}[/]: {RECIPES[name].about}")
        try:
            Site(venvs).install(name)
        except subprocess.CalledProcessError as error:
            console.print(f"  [red]{error}[/]")
            failed.append(name)
    if failed:
        raise typer.Exit(1)


@app.command()
def engines(
    model: Model,
    long: Annotated[bool, typer.Option(help="Decode 1 and 8 at 2048 tokens too.")] = False,
    only: Only = None,
    bound: Annotated[float, typer.Option(help="Seconds for an engine, once loaded.")] = 80,
    rounds: Rounds = 1,
    resume: Resume = False,
    out: Out = None,
    venvs: Venvs = VENVS,
) -> None:
    """Each engine alone, all cores: tokens per second."""
    cases = engine_peers.cases([512, 2048] if long else [512])
    kv_tokens = max(case.kv_tokens for case in cases)
    record = Record(out or RESULTS / "peers-engines.json", resume)
    peers = engine_peers.peers(model, _site(venvs), kv_tokens)
    compare(_chosen(peers, only), cases, record, bound, console, rounds)
    _show(record, ["tokens/s"], "Engines, two threads", "kvferry")


@app.command()
def systems(
    model: Model,
    only: Only = None,
    bound: Annotated[float, typer.Option(help="Seconds for each system, once it serves.")] = 300,
    resume: Resume = False,
    out: Out = None,
    venvs: Venvs = VENVS,
) -> None:
    """One prefill and one decode worker behind HTTP, a core each."""
    record = Record(out or RESULTS / "peers-systems.json", resume)
    peers = system_peers.peers(model, _site(venvs))
    compare(_chosen(peers, only), system_peers.CASES, record, bound, console)
    _show(record, system_peers.METRICS, "Systems", "kvferry")


@app.command()
def transfers(
    max_tokens: Annotated[int, typer.Option(help="Longest prompt whose KV moves.")] = 32768,
    only: Only = None,
    bound: Annotated[float, typer.Option(help="Seconds for each transfer engine, a round.")] = 80,
    rounds: Rounds = 3,
    resume: Resume = False,
    out: Out = None,
    venvs: Venvs = VENVS,
) -> None:
    """KV from one process to another on this host."""
    cases = transfer_peers.cases(max_tokens)
    arena = max(case.num_bytes for case in cases)
    record = Record(out or RESULTS / "peers-transfers.json", resume)
    peers = transfer_peers.peers(_site(venvs), arena)
    compare(_chosen(peers, only), cases, record, bound, console, rounds)
    _show(record, ["GiB/s"], "Transfers", "kvferry, TCP")


def _site(venvs: Path) -> Site:
    """Two of the cores this process may use are what every comparison is made on."""
    return Site(venvs, tuple(sorted(os.sched_getaffinity(0))[:2]))


def _chosen(peers: list[Peer], only: list[str] | None) -> list[Peer]:
    chosen = [p for p in peers if not only or p.name.startswith(tuple(only))]
    if not chosen:
        raise typer.BadParameter(f"no row begins so; there are {[p.name for p in peers]}")
    return chosen


def _show(record: Record, metrics: list[str] | tuple[str, ...], title: str, baseline: str) -> None:
    for metric in metrics:
        console.print(record.table(metric, f"{title}: {metric} (ratio to {baseline})", baseline))
    for peer, reason in record.failures().items():
        console.print(f"[red]{peer}[/]: {reason}", highlight=False)


if __name__ == "__main__":
    app()
