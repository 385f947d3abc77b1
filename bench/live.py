"""The simulator against the running system: the same requests, measured and predicted.

    python -m bench.live --seconds 60

Starts ``kvferry serve`` on this machine as 1P1D and then as one colocated worker. Each serves the
same drawn requests, as an open loop, at five shares of what the model says it could carry. The
latency model is fitted to the steps that the workers timed meanwhile, then every load is simulated
with the arrivals that really were. A machine with other work on it makes both sides noise.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from random import randrange
from statistics import mean
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from bench.streams import stream
from planner.fit import observed_profile
from planner.observed import Row, placement_of
from planner.outcome import Outcome
from planner.profile import Link
from planner.simulator import simulate
from planner.what_if import capacity
from planner.workload import Lengths, Request, generate

RESULTS = Path(__file__).parent / "results"
DEPLOYMENTS = {
    "1P1D": ("--prefill", "1", "--decode", "1", "--disaggregation", "always"),
    "colocated": ("--prefill", "0", "--decode", "1"),
}
LOADS = (0.2, 0.4, 0.6, 0.75, 0.9)  # of the capacity
WARM_UP, WARM_UP_RATE = 30.0, 1.2  # seconds, requests a second
HEARTBEATS = 1.0  # seconds until all steps have been told
FIGURES = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
LOCAL = Link(bytes_per_second=2e9, latency=1e-3)  # mapped memory of one host


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    seconds: Annotated[float, typer.Option(help="Of each load.", min=2)] = 60.0,
    prompt_tokens: Annotated[float, typer.Option(help="Mean.", min=2)] = 400,
    output_tokens: Annotated[float, typer.Option(help="Mean.", min=2)] = 40,
    most: Annotated[float, typer.Option(help="Requests a second, at most.", min=1)] = 50.0,
) -> None:
    """Print a table of each deployment and write both to bench/results/live.json."""
    lengths = Lengths(prompt_tokens, 0.5), Lengths(output_tokens, 0.5)
    rows = {
        name: _deployment(name, options, model, seconds, lengths, most)
        for name, options in DEPLOYMENTS.items()
    }
    RESULTS.mkdir(exist_ok=True)
    settings = {"model": model, "seconds": seconds, "prompt": prompt_tokens}
    record = {"settings": settings | {"output": output_tokens}, "deployments": rows}
    (RESULTS / "live.json").write_text(json.dumps(record, indent=1) + "\n")


def _deployment(
    name: str,
    options: tuple[str, ...],
    model: str,
    seconds: float,
    lengths: tuple[Lengths, Lengths],
    most: float,
) -> list[dict[str, float]]:
    with serving(model, *options) as deployment:
        url = deployment.url
        served = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        drawn = _draw(WARM_UP_RATE, WARM_UP, lengths)
        asyncio.run(_send(url, served, drawn))  # warms up, and tells what a step takes
        workers = _workers(url)
        placement = placement_of(workers, mean(request.prompt_tokens for request in drawn))
        carried = min(most, capacity(drawn, placement, observed_profile(workers, link=LOCAL)))
        runs = []
        for load in LOADS:
            requests = _draw(load * carried, seconds, lengths)
            runs.append((load * carried, *asyncio.run(_send(url, served, requests))))
        told = httpx.get(f"{url}/admin/workload?seconds=3600").json()["rows"]
        profile = observed_profile(_workers(url), [Row(*row) for row in told], LOCAL)
    rows = []
    for rate, requests, measured in runs:
        predicted = simulate(requests, placement, profile, detail="exact").figures()
        felt = measured.figures()
        row = {"rate": rate, "requests": len(requests), "failed": measured.num_rejected}
        row |= {f"measured_{figure}_ms": felt[figure] * 1e3 for figure in FIGURES}
        rows.append(row | {f"predicted_{figure}_ms": predicted[figure] * 1e3 for figure in FIGURES})
    _show(name, rows)
    return rows


def _workers(url: str) -> list[dict[str, Any]]:
    time.sleep(HEARTBEATS)
    rows: list[dict[str, Any]] = httpx.get(f"{url}/admin/workers").json()["workers"]
    return rows


def _draw(rate: float, seconds: float, lengths: tuple[Lengths, Lengths]) -> list[Request]:
    prompt, output = lengths
    count = max(2, round(rate * seconds))
    drawn = generate(rate=rate, count=count, prompt=prompt, output=output)
    return [replace(one, output_tokens=max(2, one.output_tokens)) for one in drawn]


async def _send(url: str, model: str, requests: list[Request]) -> tuple[list[Request], Outcome]:
    """Send each at its time; the requests as they really came, and what their clients felt."""
    began, outcome = time.perf_counter(), Outcome()
    sent: list[Request] = []

    async def one(request: Request) -> None:
        await asyncio.sleep(began + request.arrival - time.perf_counter())
        now = time.perf_counter()
        sent.append(replace(request, arrival=now - began))
        body = {
            "model": model,
            "prompt": [randrange(300, 3000) for _ in range(request.prompt_tokens)],  # never cached
            "max_tokens": request.output_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        status, arrivals = await stream(f"{url}/v1/completions", body)
        if status == 200:
            tpot = (arrivals[-1] - arrivals[0]) / (request.output_tokens - 1)
            outcome.add(arrivals[0] - now, tpot)
        else:
            outcome.num_rejected += 1

    await asyncio.gather(*map(one, requests))
    return sorted(sent, key=lambda request: request.arrival), outcome


def _show(name: str, rows: list[dict[str, float]]) -> None:
    table = Table("requests/s", *FIGURES, title=f"{name}: ms measured, predicted, off by")
    for row in rows:
        texts = []
        for figure in FIGURES:
            measured, predicted = row[f"measured_{figure}_ms"], row[f"predicted_{figure}_ms"]
            texts.append(f"{measured:.1f}, {predicted:.1f}, {predicted / measured - 1:+.0%}")
        table.add_row(f"{row['rate']:.2f}", *texts)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
