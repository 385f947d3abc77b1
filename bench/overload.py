"""What a deployment delivers when it is asked for more than it can do.

    python -m bench.overload --seconds 15

Starts ``kvferry serve`` on this machine, measures its capacity (requests a second with twice as
many clients as decode has slots, each waiting for its answer), and then offers multiples of it as
open loops: Poisson arrivals that wait for nobody. Goodput counts the requests answered in full
whose first token came within the bound. The last row is half the capacity again, once the overload
is over.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from bench.streams import stream

RESULTS = Path(__file__).parent / "results"
LOADS = (0.5, 1.0, 2.0, 3.0, 0.5)  # times the capacity
PROMPT_TOKENS = 64
WARM_UP = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it. Times in seconds from its arrival."""

    status: int
    first_token: float  # or the error
    end: float


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    seconds: Annotated[float, typer.Option(help="Of each load.", min=1)] = 15.0,
    slots: Annotated[int, typer.Option(help="Decode's --max-num-seqs.", min=1)] = 4,
    output_tokens: Annotated[int, typer.Option(help="Of each request.", min=2)] = 128,
    bound: Annotated[float, typer.Option(help="Seconds to the first token, at most.")] = 3.0,
    queue_time: Annotated[float, typer.Option(help="The router's --max-queue-time.")] = 2.0,
) -> None:
    """Print the table and write it to bench/results/overload.json."""
    options = ["--max-num-seqs", str(slots), "--max-queue-time", str(queue_time)]
    with serving(model, *options) as deployment:
        url = deployment.url
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        rows = asyncio.run(measure(Asker(url, name, output_tokens), seconds, slots, bound))
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    settings = {"model": model, "slots": slots, "output_tokens": output_tokens}
    settings |= {"bound_s": bound, "max_queue_time_s": queue_time}
    record = {"settings": settings, "loads": rows}
    (RESULTS / "overload.json").write_text(json.dumps(record, indent=1) + "\n")


async def measure(asker: Asker, seconds: float, slots: int, bound: float) -> list[dict[str, float]]:
    """One row for each load."""
    await closed_loop(asker, slots, WARM_UP)
    capacity = await closed_loop(asker, 2 * slots, seconds)
    rows: list[dict[str, float]] = []
    for load in LOADS:
        outcomes = await open_loop(asker, load * capacity, seconds)
        rows.append({"load": load, **figures(outcomes, seconds, bound, capacity)})
    return rows


class Asker:
    """Sends requests with prompts of their own."""

    def __init__(self, url: str, model: str, output_tokens: int) -> None:
        self._url = f"{url}/v1/completions"
        self._rng = random.Random(1)
        self._body: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "stream": True}
        self._body |= {"ignore_eos": True, "temperature": 0}

    async def ask(self) -> Outcome:
        """One request, from its arrival to its end."""
        prompt = [self._rng.randrange(300, 3000) for _ in range(PROMPT_TOKENS)]
        sent = time.perf_counter()
        status, arrivals = await stream(self._url, {**self._body, "prompt": prompt})
        end = time.perf_counter()
        return Outcome(status, (arrivals[0] if arrivals else end) - sent, end - sent)


async def closed_loop(asker: Asker, clients: int, seconds: float) -> float:
    """Requests a second that ``clients`` get done, each asking again when it is answered."""
    began = time.perf_counter()
    outcomes: list[Outcome] = []

    async def client() -> None:
        while time.perf_counter() < began + seconds:
            outcomes.append(await asker.ask())

    await asyncio.gather(*(client() for _ in range(clients)))
    return sum(o.status == 200 for o in outcomes) / (time.perf_counter() - began)


async def open_loop(asker: Asker, rate: float, seconds: float) -> list[Outcome]:
    """Poisson arrivals at ``rate`` a second; everything that was asked is waited for."""
    rng = random.Random(2)
    end = time.perf_counter() + seconds
    asked: list[asyncio.Task[Outcome]] = []
    moment = time.perf_counter()
    while (moment := moment + rng.expovariate(rate)) < end:
        await asyncio.sleep(moment - time.perf_counter())
        asked.append(asyncio.create_task(asker.ask()))
    return await asyncio.gather(*asked)


def figures(
    outcomes: list[Outcome], seconds: float, bound: float, capacity: float
) -> dict[str, float]:
    """A load's row. Goodput is relative to the capacity."""
    served = [o for o in outcomes if o.status == 200]
    shed = [o for o in outcomes if o.status == 429]
    good = [o for o in served if o.first_token <= bound]
    first = sorted(o.first_token for o in served) or [0.0]
    refusal = sorted(o.end for o in shed) or [0.0]
    return {
        "offered_per_s": len(outcomes) / seconds,
        "goodput": len(good) / seconds / capacity,
        "shed": len(shed),
        "failed": len(outcomes) - len(served) - len(shed),
        "ttft_p50_s": statistics.median(first),
        "ttft_p95_s": first[int(0.95 * (len(first) - 1))],
        "refusal_p50_ms": 1e3 * statistics.median(refusal),
        "refusal_p95_ms": 1e3 * refusal[int(0.95 * (len(refusal) - 1))],
    }


def show(rows: list[dict[str, float]]) -> None:
    """Print the rows as a table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
