"""The same engine with and without a prefill pool, under short chats and long prompts at once.

    python -m bench.colocated --seconds 30

Offers each deployment the same open loop: short prompts with long outputs, which want a steady
token rate, and now and then a long prompt, which in a colocated deployment shares its steps with
them. All deployments have two workers on this machine. The percentiles are of the short ones;
goodput counts both kinds. Deployments take turns, round by round, so that what else the machine
does meets all of them.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, replace
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from bench.serving.client import Client, served_model
from bench.serving.connection import Endpoint
from bench.serving.load import closed_loop, open_loop
from bench.serving.measures import measure
from bench.serving.prompts import TokenIds
from bench.serving.record import Result, Run
from bench.serving.workload import Item, Uniform, Workload
from planner.outcome import Slo
from tests.stack import scrape

RESULTS = Path(__file__).parent / "results"
TOKENS = TokenIds(300, 3000)
DEPLOYMENTS = {
    "1 prefill + 1 decode, always": ["--disaggregation", "always"],
    "1 prefill + 1 decode, auto": ["--disaggregation", "auto"],
    "2 colocated": ["--prefill", "0", "--decode", "2"],
}
SLOS = [Slo(0.05, 0.003), Slo(0.05, 0.01), Slo(0.2, 0.003), Slo(0.2, 0.01)]  # seconds


@dataclass(frozen=True, slots=True)
class Load:
    """Both kinds of requests. Rates are a second, lengths in tokens."""

    seconds: float
    short_rate: float
    long_rate: float
    short_prompt: int
    long_prompt: int
    output: int

    def items(self, seed: int) -> list[Item]:
        """In order of arrival; the long ones are known by their prompts."""

        def some(rate: float, prompt: int, output: int, seed: int) -> list[Item]:
            count = max(2, round(rate * self.seconds))
            lengths = Uniform(prompt, prompt), Uniform(output, output)
            return Workload(count, rate, None, *lengths, seed=seed).items()

        short = some(self.short_rate, self.short_prompt, self.output, 2 * seed)
        long = some(self.long_rate, self.long_prompt, self.output // 4, 2 * seed + 1)
        return sorted([*short, *long], key=lambda item: item.arrival)


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    seconds: Annotated[float, typer.Option(help="Of each round.", min=1)] = 15.0,
    rounds: Annotated[int, typer.Option(help="Of every deployment.", min=1)] = 2,
    short_rate: Annotated[float, typer.Option(help="Short prompts a second.")] = 4.0,
    long_rate: Annotated[float, typer.Option(help="Long prompts a second.")] = 1.0,
    short_prompt: Annotated[int, typer.Option(help="Tokens of a short prompt.", min=1)] = 32,
    long_prompt: Annotated[int, typer.Option(help="Tokens of a long prompt.", min=1)] = 1500,
    output: Annotated[int, typer.Option(help="Tokens of a short prompt's output.", min=8)] = 96,
) -> None:
    """Print the table and write it to bench/results/colocated.json."""
    load = Load(seconds, short_rate, long_rate, short_prompt, long_prompt, output)
    results: dict[str, list[Run]] = {name: [] for name in DEPLOYMENTS}
    paths: dict[str, float] = dict.fromkeys(DEPLOYMENTS, 0.0)  # shares of decode's own prompts
    for number in range(rounds):
        for name, options in DEPLOYMENTS.items():
            run, paths[name] = offer(model, options, load, seed=number + 1)
            results[name].append(run)
    rows = [figures(name, together(runs), load) for name, runs in results.items()]
    for row in rows:
        row["local"] = paths[row["deployment"]]
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    record = {"settings": {"model": model, "rounds": rounds}, "load": asdict(load)}
    (RESULTS / "colocated.json").write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def offer(model: str, options: list[str], load: Load, seed: int) -> tuple[Run, float]:
    """One round on a fresh deployment, and the share of the prompts that decode computed."""
    with serving(model, *options) as deployment, httpx.Client(timeout=5) as http:
        run = asyncio.run(ask(deployment.url, load, seed))
        samples = scrape(f"{deployment.url}/metrics", http)
    local, remote = (
        samples.get(f"kvferry_requests_path_total{{path={path}}}", 0.0)
        for path in ("local", "remote")
    )
    return run, local / (local + remote)


async def ask(url: str, load: Load, seed: int) -> Run:
    """Warm up with some of another round's requests, then play the load."""
    endpoint = Endpoint(url, None)
    try:
        client = Client(endpoint, await served_model(endpoint), "completions", TOKENS)
        ignore = (lambda: None), (lambda _: None)
        await closed_loop(client, load.items(seed + 1000)[:12], 4, *ignore)
        return await open_loop(client, load.items(seed), load.short_rate + load.long_rate, *ignore)
    finally:
        endpoint.close()


def together(runs: list[Run]) -> Run:
    """Rounds as if one had come after the other."""
    results: list[Result] = []
    end = 0.0
    for run in runs:
        results += [
            replace(r, scheduled=end + r.scheduled, sent=end + r.sent, ended=end + r.ended)
            for r in run.results
        ]
        end = max(result.ended for result in results)
    return Run(runs[0].rate, tuple(results), runs[0].client)


def figures(name: str, run: Run, load: Load) -> dict[str, Any]:
    """One row. Seconds; goodput, in requests a second, for each objective."""
    whole = {_text(slo): measure(run, slo) for slo in SLOS}
    is_short = [result.expected_tokens == load.output for result in run.results]
    short, long = (
        measure(replace(run, results=tuple(compress(run.results, wanted))), SLOS[0])
        for wanted in (is_short, map(not_, is_short))
    )
    return {
        "deployment": name,
        "goodput": {text: measures.goodput for text, measures in whole.items()},
        "errors": sum(whole[_text(SLOS[0])].errors.values()),
        "ttft_p50": short.ttft.p50,
        "ttft_p99": short.ttft.p99,
        "itl_p50": short.itl.p50,
        "itl_p99": short.itl.p99,
        "long_ttft_p50": long.ttft.p50,
    }


def _text(slo: Slo) -> str:
    return f"TTFT {slo.ttft * 1e3:g}, TPOT {slo.tpot * 1e3:g} ms"


def show(rows: list[dict[str, Any]]) -> None:
    """The tables, times in milliseconds."""
    times = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "long_ttft_p50")
    latencies = Table("", "local", "errors", *times, title="latency of short prompts, ms")
    goodputs = Table("", *rows[0]["goodput"], title="goodput, requests a second")
    for row in rows:
        shown = [f"{row['local']:.0%}", str(row["errors"])]
        shown += [f"{row[name] * 1e3:.1f}" for name in times]
        latencies.add_row(row["deployment"], *shown)
        goodputs.add_row(row["deployment"], *(f"{rate:.2f}" for rate in row["goodput"].values()))
    for table in (latencies, goodputs):
        Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
