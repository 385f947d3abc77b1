"""The autopilot at work on this machine: when the mix of requests shifts, it flips a worker.

    python -m bench.autopilot

Starts ``kvferry serve`` with three workers and ``kvferry autopilot --mode on`` beside it. First
come short prompts with long answers, then long prompts with short answers; every stream must end
with all its tokens. Prints what was decided and how many requests of each part kept both deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from bench.streams import stream
from planner.outcome import Outcome, Slo

RESULTS = Path(__file__).parent / "results"
REFUSED = 429
DEPLOYMENT = ("--prefill", "1", "--decode", "2", "--disaggregation", "always")


@dataclass(frozen=True, slots=True)
class Part:
    """Requests that are alike, at ``rate`` a second."""

    name: str
    prompt_tokens: int
    output_tokens: int
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Answer:
    """Times in seconds; ``whole``: with every token that was asked for."""

    status: int
    ttft: float = 0.0
    tpot: float = 0.0
    whole: bool = False


def main(
    answers: Annotated[float, typer.Option(help="Seconds of long answers.", min=10)] = 75.0,
    prompts: Annotated[float, typer.Option(help="Seconds of long prompts.", min=10)] = 120.0,
    slo_ttft: Annotated[float, typer.Option(help="Milliseconds.")] = 400.0,
    slo_tpot: Annotated[float, typer.Option(help="Milliseconds.")] = 20.0,
    picture: Annotated[
        Path | None, typer.Option(help="PNG of the console at the end; needs playwright.")
    ] = None,
) -> None:
    """Print what happened and write it to bench/results/autopilot.json."""
    parts = [
        Part("long answers", 60, 120, 6.0, answers),
        Part("long prompts", 1400, 8, 8.0, prompts),
    ]
    objective = ["--slo-ttft", str(slo_ttft), "--slo-tpot", str(slo_tpot)]
    pilot = ["autopilot", *objective, "--mode", "on", "--cool-down", "30", "--interval", "2"]
    with (
        serving("demo", *DEPLOYMENT) as deployment,
        _command(*pilot, "--router", deployment.url),
    ):
        url = deployment.url
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        rows = asyncio.run(_play(url, model, parts, Slo(slo_ttft / 1e3, slo_tpot / 1e3)))
        decisions = httpx.get(f"{url}/admin/autopilot").json()["autopilot"]["decisions"]
        pools = httpx.get(f"{url}/admin/pools").json()
        if picture is not None:
            _take(picture, url, {"ttft": slo_ttft, "tpot": slo_tpot})
    table = Table("part", *list(rows[0])[1:])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    console.print(table)
    for one in reversed(decisions):
        console.print_json(json.dumps(one))
    console.print(f"pools at the end: {pools['prefill']} prefill, {pools['decode']} decode")
    record = {"parts": rows, "decisions": decisions, "pools": pools}
    (RESULTS / "autopilot.json").write_text(json.dumps(record, indent=1) + "\n")


async def _play(url: str, model: str, parts: list[Part], slo: Slo) -> list[dict[str, Any]]:
    sending: list[tuple[Part, asyncio.Task[_Answer]]] = []
    for part in parts:
        end = time.monotonic() + part.seconds
        while time.monotonic() < end:
            sending.append((part, asyncio.create_task(_one(url, model, part))))
            await asyncio.sleep(random.expovariate(part.rate))
    rows = []
    for part in parts:
        told = [await task for of, task in sending if of is part]
        outcome = Outcome()
        for one in told:
            if one.whole:
                outcome.add(one.ttft, one.tpot)
            else:
                outcome.num_rejected += 1
        refused = sum(one.status == REFUSED for one in told)
        rows.append(
            {
                "part": part.name,
                "requests": len(told),
                "refused": refused,
                "broken": outcome.num_rejected - refused,
                "within the SLO": round(outcome.attainment(slo), 3),
            }
        )
    return rows


async def _one(url: str, model: str, part: Part) -> _Answer:
    body = {
        "model": model,
        "prompt": [random.randrange(300, 3000) for _ in range(part.prompt_tokens)],
        "max_tokens": part.output_tokens,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    sent, num_tokens = time.perf_counter(), 0

    def tokens(line: bytes) -> int:
        nonlocal num_tokens
        event = json.loads(line.removeprefix(b"data: "))
        new = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
        num_tokens += new
        return new

    status, arrivals = await stream(f"{url}/v1/completions", body, tokens)
    if status != 200 or num_tokens != part.output_tokens:
        return _Answer(status)
    tpot = (arrivals[-1] - arrivals[0]) / (part.output_tokens - 1)
    return _Answer(status, arrivals[0] - sent, tpot, whole=True)


def _take(picture: Path, url: str, objective: dict[str, float]) -> None:
    from bench.console_images import console

    with console(url, objective) as page:
        part = page.locator("#autopilot")
        part.wait_for()
        part.evaluate("part => part.scrollIntoView({ block: 'end' })")
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=picture)


@contextlib.contextmanager
def _command(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    typer.run(main)
