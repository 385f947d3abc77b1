"""Where a request's time goes, on this machine, through the whole path.

    python -m bench.latency --requests 50

Starts a router, one prefill and one decode worker as ``kvferry serve`` does, sends prompts of a
fixed length one after the other, and takes the client's times against the workers' own step
times: hand-off overhead is the client's time to first token less the prefill steps' time, and
the delay added to a streamed token is the client's interval less the decode step's time. Then
the delay added to a token is measured again with many streams at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import random
import statistics
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import psutil
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.deployment import serving
from bench.streams import stream_all
from tests.stack import scrape

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5  # of many streams
MANY_TOKENS = 256  # of each of many streams
STEP_SUM, STEP_COUNT = "kvferry_engine_step_seconds_sum", "kvferry_engine_step_seconds_count"


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    requests: Annotated[int, typer.Option(help="Measured requests.", min=5)] = 50,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 256,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for each.", min=2)] = 64,
    streams: Annotated[int, typer.Option(help="Of the measurement with many.", min=2)] = 16,
) -> None:
    """Print the figures and write them to bench/results/latency.json."""
    started = time.perf_counter()
    # What is measured is the hand-off.
    with serving(model, "--disaggregation", "always") as deployment:
        start_up = time.perf_counter() - started
        url = deployment.url
        figures = {"start_up_s": start_up, **measure(url, requests, prompt_tokens, output_tokens)}
        figures |= measure_many(url, streams, prompt_tokens)
        figures["resident_mib"] = resident(deployment.pid)
    show(figures)
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {"model": model, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    machine |= {"cores": str(psutil.cpu_count()), "kernel": platform.release()}
    record = {"machine": machine, "settings": settings, "figures": figures}
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(url: str, requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Send the requests and compare the client's times with the workers'."""
    pages = {w["role"]: w["metrics"] for w in httpx.get(f"{url}/admin/workers").json()["workers"]}
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    rng = random.Random(1)
    rows: list[dict[str, float]] = []
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    with httpx.Client(timeout=60) as client, closing(connection):
        for number in track(range(requests + 3), description="requests"):
            prompt = [rng.randrange(300, 3000) for _ in range(prompt_tokens)]
            before = {role: scrape(page, client) for role, page in pages.items()}
            body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "stream": True}
            body |= {"ignore_eos": True, "temperature": 0}
            arrivals = stream(connection, body)
            time.sleep(0.05)  # the hand-off's last messages
            after = {role: scrape(page, client) for role, page in pages.items()}
            if number >= 3:  # the first ones warm up
                rows.append(compare(arrivals, before, after))
    return {name: summary([row[name] for row in rows]) for name in rows[0]}


def measure_many(url: str, streams: int, prompt_tokens: int) -> dict[str, Any]:
    """The interval between tokens while ``streams`` run at once, and the decode step's time.

    A generation is as long as it takes for all streams to overlap for most of it; only intervals
    while all of them run are counted.
    """
    workers = httpx.get(f"{url}/admin/workers").json()["workers"]
    (page,) = [worker["metrics"] for worker in workers if worker["role"] == "decode"]
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    rng = random.Random(2)
    rows: list[dict[str, float]] = []
    with httpx.Client(timeout=60) as client:
        for number in track(range(ROUNDS + 1), description=f"{streams} streams"):
            bodies = [
                {
                    "model": model,
                    "prompt": [rng.randrange(300, 3000) for _ in range(prompt_tokens)],
                    "max_tokens": MANY_TOKENS,
                    "stream": True,
                    "ignore_eos": True,
                    "temperature": 0,
                }
                for _ in range(streams)
            ]
            before = scrape(page, client)
            arrivals = asyncio.run(stream_all(f"{url}/v1/completions", bodies))
            after = scrape(page, client)
            if number:  # the first one warms up
                steps = after[STEP_COUNT] - before[STEP_COUNT]
                step = (after[STEP_SUM] - before[STEP_SUM]) / steps
                interval = statistics.median(overlapping_intervals(arrivals))
                rows.append({"interval": interval, "step": step, "added": interval - step})
    return {
        f"{name}_at_{streams}_streams_ms": summary([row[name] * 1e3 for row in rows])
        for name in rows[0]
    }


def overlapping_intervals(arrivals: list[list[float]]) -> list[float]:
    """Seconds between the tokens of a stream, of those that come while all streams run."""
    start, end = max(times[1] for times in arrivals), min(times[-1] for times in arrivals)
    return [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if earlier >= start and later <= end
    ]


def stream(connection: HTTPConnection, body: dict[str, Any]) -> list[float]:
    """Seconds from sending the request to each event that carries text or ends the answer.

    Over a plain, open connection: the work of a comfortable client is no part of the hand-off.
    """
    content = json.dumps(body).encode()
    sent = time.perf_counter()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"the answer is {answer.status}: {answer.read().decode()}")
    arrivals = []
    while line := answer.readline():
        if line.startswith(b"data: {"):
            arrivals.append(time.perf_counter() - sent)
    return arrivals


def compare(
    arrivals: list[float], before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]
) -> dict[str, float]:
    """One request's figures, in milliseconds."""

    def grown(role: str, name: str) -> float:
        return after[role][name] - before[role][name]

    prefill = grown("prefill", STEP_SUM)
    step = grown("decode", STEP_SUM) / grown("decode", STEP_COUNT)
    interval = (arrivals[-1] - arrivals[1]) / grown("decode", STEP_COUNT)
    parts = {
        "time_to_first_token": arrivals[0],
        "prefill_compute": prefill,
        "handoff_overhead": arrivals[0] - prefill,
        "prefill_queue_and_grant": grown("prefill", "kvferry_request_queue_time_seconds_sum"),
        "kv_transfer": grown("prefill", "kvferry_kv_transfer_seconds_sum"),
        "inter_token_latency": interval,
        "decode_step": step,
        "added_per_token": interval - step,
    }
    return {f"{name}_ms": value * 1e3 for name, value in parts.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"p50": statistics.median(values), "p90": statistics.quantiles(values, n=10)[8]}


def resident(pid: int) -> dict[str, float]:
    """Resident memory of each process of the deployment, in MiB."""
    sizes: dict[str, float] = {}
    for process in psutil.Process(pid).children(recursive=True):
        words = process.cmdline()
        name = words[words.index("--worker-id") + 1] if "--worker-id" in words else "router"
        sizes[name] = process.memory_info().rss / 2**20
    return sizes


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("figure", "p50", "p90")
    for name, value in figures.items():
        if isinstance(value, dict) and "p50" in value:
            table.add_row(name, f"{value['p50']:.2f}", f"{value['p90']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"start-up {figures['start_up_s']:.1f} s; resident MiB {figures['resident_mib']}")


if __name__ == "__main__":
    typer.run(main)
