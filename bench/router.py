"""What the router costs: delay added to a token, processor time, memory, and where they go.

    python -m bench.router measure
    python -m bench.router profile --streams 256

``measure`` prints and keeps everything and takes about two minutes; ``profile`` is its last part.

The router is a process of its own, as ``kvferry router`` starts it, with the demo model's
tokenizer. Dummy workers and the clients share this process and its clock, so a token's delay is
from its worker's sending to its client's reading, link, router and HTTP included. Tokens come at a
given total rate, that the router is not to be saturated with: saturation is one over the processor
time a token.
"""

from __future__ import annotations

import asyncio
import json
import platform
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import wait_for_workers
from bench.dummy_workers import DummyPools
from bench.streams import stream, stream_all
from protocol.hashing import KEY_BYTES
from protocol.messages import CacheChanges
from router.cached_blocks import CachedBlocks
from tests.stack import free_port, scrape

RESULTS = Path(__file__).parent / "results"
STREAMS = [1, 16, 256, 2000]
BATCH = 256  # sequences of a decode worker
FIRST_ID, BASE = 300, 1000  # a stream's number is the first two ids of its prompt
TEXT = " self"  # of the token that the dummies generate
SPACING = 0.004  # seconds from one stream's begin to the next
SETTLE = 0.5  # seconds of rest before and after
RETRIES = "kvferry_request_retries_total"

console = Console()
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Load:
    """Streams, soon all open, and how fast their tokens come."""

    streams: int
    tokens: int  # of each
    prompt_tokens: int
    interval: float  # seconds


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load. Times are in seconds."""

    streams: int
    tokens_per_second: float  # that were served
    delay_p50: float  # from a worker's sending of a token to its client's reading
    delay_p99: float
    request_p50: float  # from a client's sending of the prompt to the prefill worker's reading
    request_p99: float
    tokens_per_cpu_second: float
    kib_per_stream: float
    retries: float  # of requests whose worker was taken for lost: there is no reason for any


@app.command()
def measure(
    streams: Annotated[list[int] | None, typer.Option(help="At once; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each stream.", min=2)] = 60,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt.", min=3)] = 128,
    rate: Annotated[float, typer.Option(help="Tokens a second, all streams together.")] = 4000,
) -> None:
    """Print all figures, keep them in bench/results/router.json."""
    table = Table(title="the router's cost, dummy workers")
    for column in ("streams", "tokens/s", "added to a token, ms: p50", "p99"):
        table.add_column(column, justify="right")
    for column in ("to a request: p50", "p99", "tokens a CPU second", "KiB a stream", "retries"):
        table.add_column(column, justify="right")
    rows = []
    for count in streams or STREAMS:
        load = Load(count, tokens, prompt_tokens, max(0.02, count / rate))
        with running_router() as (url, endpoint, process):
            rows.append(asyncio.run(_measure(load, url, endpoint, process.pid)))
        figures = rows[-1]
        table.add_row(
            str(count),
            f"{figures.tokens_per_second:.0f}",
            *(f"{1e3 * t:.2f}" for t in (figures.delay_p50, figures.delay_p99)),
            *(f"{1e3 * t:.2f}" for t in (figures.request_p50, figures.request_p99)),
            f"{figures.tokens_per_cpu_second:.0f}",
            f"{figures.kib_per_stream:.1f}",
            f"{figures.retries:.0f}",
        )
    console.print(table)
    index = index_mib()
    console.print(f"index of a million cached blocks: {index:.0f} MiB")
    record = {
        "machine": {"python": platform.python_version(), "cores": psutil.cpu_count()},
        "figures": [asdict(figures) for figures in rows],
        "index_mib_per_million_blocks": index,
        "profile": profile(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "router.json").write_text(json.dumps(record, indent=1) + "\n")


def index_mib() -> float:
    """Memory of what a router knows of a worker's cache of a million blocks."""
    blocks, cached = 10**6, CachedBlocks()
    tracemalloc.start()
    stored = random.Random(1).randbytes(KEY_BYTES * blocks)
    own, _ = tracemalloc.get_traced_memory()
    cached.apply(CacheChanges(number=0, stored=stored, evicted=b""))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - own) / 2**20


@app.command()
def profile(
    streams: Annotated[int, typer.Option(help="At once.")] = 256,
    tokens: Annotated[int, typer.Option(help="Of each stream.", min=2)] = 100,
    rate: Annotated[float, typer.Option(help="Tokens a second, all streams together.")] = 2000,
) -> dict[str, float]:
    """Print where the router's time goes, by package, under Python's deterministic profiler."""
    load = Load(streams, tokens, 128, max(0.02, streams / rate))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "router.prof"
        with running_router("-m", "cProfile", "-o", str(file)) as (url, endpoint, process):
            asyncio.run(_measure(load, url, endpoint, process.pid))
        stats = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    seconds: dict[str, float] = defaultdict(float)
    for (path, _, name), (_, _, own, _, _) in stats.items():
        seconds[_package(path, name)] += own
    waiting, whole = seconds.pop("waiting", 0.0), sum(seconds.values())
    shares = {p: s / whole for p, s in sorted(seconds.items(), key=lambda item: -item[1])[:14]}
    table = Table(title=f"{streams} streams: the router's own time, by package")
    table.add_column("package")
    table.add_column("share", justify="right")
    for package, share in shares.items():
        table.add_row(package, f"{share:.1%}")
    console.print(table)
    console.print(f"{whole:.1f} s of work, start included, {waiting:.1f} s of waiting")
    return shares


@contextmanager
def running_router(*python: str) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """A router's HTTP address, its control endpoint and its process; ``python``: more options."""
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        port, endpoint = free_port(), f"ipc://{folder}/control"
        command = [sys.executable, *python, "-m", "cli.main", "router", "--model", "demo"]
        command += ["--port", str(port), "--control", endpoint, "--max-num-requests", "4096"]
        command += ["--disaggregation", "always"]
        process = subprocess.Popen(command)
        try:
            yield f"http://127.0.0.1:{port}", endpoint, process
        finally:
            process.terminate()
            process.wait()


async def _stream(route: str, number: int, body: dict[str, Any]) -> tuple[float, list[float]]:
    """When it began, and when each token came."""
    await asyncio.sleep(number * SPACING)
    began = time.perf_counter()
    status, arrivals = await stream(route, body, _tokens)
    if status != 200:
        raise RuntimeError(f"stream {number} ended with {status}")
    return began, arrivals


def _tokens(event: bytes) -> int:
    """How many tokens an event holds: a client that reads slowly gets several in one."""
    return event.count(TEXT.encode())


async def _measure(load: Load, url: str, endpoint: str, pid: int) -> Figures:
    sent: dict[tuple[int, int], float] = {}  # when, by stream and token

    def stamp(prompt: list[int], token: int) -> None:
        number = (prompt[0] - FIRST_ID) * BASE + prompt[1] - FIRST_ID
        sent[number, token] = time.perf_counter()

    router, route = psutil.Process(pid), f"{url}/v1/completions"
    async with DummyPools(endpoint, load.streams, BATCH, load.interval, stamp):
        await asyncio.to_thread(wait_for_workers, url, 1 + -(-load.streams // BATCH))
        async with httpx.AsyncClient(base_url=url) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            asked = await client.post("/tokenize", json={"model": model, "prompt": TEXT})
        token_id = asked.json()["tokens"][-1]
        bodies = [_body(load, number, token_id, model) for number in range(load.streams)]
        await stream_all(route, bodies[:16])  # warm
        await asyncio.sleep(SETTLE)
        idle, cpu, began = router.memory_info().rss, _cpu(router), time.perf_counter()
        streaming = asyncio.gather(*(_stream(route, n, body) for n, body in enumerate(bodies)))
        await asyncio.sleep(load.streams * SPACING + load.tokens / 2 * load.interval)
        resident = router.memory_info().rss
        begun, arrivals = zip(*await streaming, strict=True)
        seconds, used = time.perf_counter() - began, _cpu(router) - cpu
        with httpx.Client() as scraping:
            counted = await asyncio.to_thread(scrape, f"{url}/metrics", scraping)
    if any(len(times) != load.tokens for times in arrivals):
        raise RuntimeError("tokens are missing")
    delays = [
        at - sent[number, token]
        for number, times in enumerate(arrivals)
        for token, at in enumerate(times)
    ]
    requests = [sent[number, 0] - at for number, at in enumerate(begun)]
    return Figures(
        streams=load.streams,
        tokens_per_second=len(delays) / seconds,
        delay_p50=statistics.median(delays),
        delay_p99=sorted(delays)[int(0.99 * len(delays))],
        request_p50=statistics.median(requests),
        request_p99=sorted(requests)[int(0.99 * len(requests))],
        tokens_per_cpu_second=len(delays) / used,
        kib_per_stream=(resident - idle) / 1024 / load.streams,
        retries=sum(n for name, n in counted.items() if name.startswith(RETRIES)),
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _body(load: Load, number: int, token_id: int, model: str) -> dict[str, Any]:
    """A request for ``load.tokens`` times the token that its prompt ends with."""
    head = [FIRST_ID + number // BASE, FIRST_ID + number % BASE]
    return {
        "model": model,
        "prompt": [*head, *[token_id] * (load.prompt_tokens - len(head))],
        "max_tokens": load.tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }


def _package(path: str, name: str) -> str:
    """Whose code a profiled function is."""
    if "poll" in name or "Loop.run" in name:
        return "waiting"
    parts = Path(path).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if Path.cwd() in Path(path).parents:
        return Path(path).relative_to(Path.cwd()).parts[0]
    return "built in" if path == "~" else "standard library"


if __name__ == "__main__":
    app()
