"""Traces through the real router and workers, for each policy and number of routers.

    python -m bench.replay TRACE --policy prefix-aware --policy round-robin
    python -m bench.replay --routers 1 --routers 3 --policy prefix-aware

Serves the demo model as 2P2D on this machine, anew for each run, and sends requests as an open
loop, to the routers in turn. Lengths are divided by 64 and blocks have 512 / 64 tokens, so that a
model of 2048 tokens sees the trace's shape. Three cases:

    trace   TRACE, in Mooncake's JSON lines; without one, chats that grow (``growing_chats``)
    apart   prompts of which none shares anything: how even the load is
    hot     the same prompts, 80 % of which begin alike: whether one worker drowns

``ideal`` is what one LRU cache as large as the prefill pool's together would find, every prompt
being there at once. Load is what prefill computed and what decode generated, most over mean.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.routing import ideal_hits, spread
from bench.serving.client import Client
from bench.serving.connection import Endpoint
from bench.serving.load import open_loop
from bench.serving.prompts import TokenIds
from bench.serving.record import Result
from bench.serving.workload import Item, Workload
from engine.sequence import Sequence as Prompt
from planner.workload import PREFIX_TOKENS, Lengths, Request, generate
from protocol.sampling import SamplingParams
from router.policy import POLICIES, PolicyName
from tests.replicas import Replicas
from tests.stack import scrape

Case = Literal["trace", "apart", "hot"]
Name = TypeVar("Name", bound=str)

RESULTS = Path(__file__).parent / "results"
DIVISOR = 64
BLOCK = PREFIX_TOKENS // DIVISOR
MAX_LEN = 2048  # of the demo model
WORKERS = 2  # of each pool
TOKENS = TokenIds(300, 3000)
WARM_UP = 16  # requests
PROMPT, OUTPUT = Lengths(12_000, 0.5), Lengths(340, 0.5)  # means of Mooncake's conversations
HOT, HOT_BLOCKS = 0.8, 16  # share of the requests that begin alike, and in how many blocks
USERS, TURNS = 32, 8  # of chats that grow: at once, and on average


# Cases ---------------------------------------------------------------------------------------


def growing_chats(count: int, seed: int = 0) -> Iterator[Request]:
    """Chats whose turns repeat all that was said, at one request a second on average.

    All begin with the same system prompt of two blocks. Each turn adds one to four.
    """
    random, number, arrival = Random(seed), iter(range(2, 1 << 40)), 0.0
    chats: list[list[int]] = [[0, 1] for _ in range(USERS)]
    for _ in range(count):
        chat = random.choice(chats)
        if random.random() < 1 / TURNS:
            del chat[2:]
        chat += [next(number) for _ in range(random.randint(1, 4))]
        tokens = PREFIX_TOKENS * len(chat) + random.randrange(PREFIX_TOKENS)
        yield Request(arrival, tokens, OUTPUT.draw(random), tuple(chat))
        arrival += random.expovariate(1.0)


def apart(count: int) -> Iterator[Request]:
    """Prompts that share nothing."""
    return generate(rate=1.0, count=count, prompt=PROMPT, output=OUTPUT)


def hot(count: int) -> Iterator[Request]:
    """The prompts of ``apart``, of which most begin with the same blocks."""
    random, prefix = Random(0), tuple(range(HOT_BLOCKS))
    for request in apart(count):
        yield replace(request, prefix=prefix) if random.random() < HOT else request


def workload(case: Case, trace: Path | None, count: int, rate: float, folder: Path) -> Workload:
    """A case's requests; a generated one is written to ``folder`` as a trace."""
    if case != "trace" or trace is None:
        makes = {"trace": growing_chats, "apart": apart, "hot": hot}
        trace = folder / f"{case}.jsonl"
        trace.write_text("".join(map(_line, makes[case](count))))
    return Workload(
        count=count, rate=rate, trace=trace, length_divisor=DIVISOR, max_len=MAX_LEN, seed=1
    )


def _line(request: Request) -> str:
    """As Mooncake writes a request."""
    row = {
        "timestamp": round(request.arrival * 1e3),
        "input_length": request.prompt_tokens,
        "output_length": request.output_tokens,
        "hash_ids": request.prefix,
    }
    return json.dumps(row) + "\n"


# Runs ----------------------------------------------------------------------------------------


def run(
    items: Sequence[Item], policy: PolicyName, num_routers: int, kv_blocks: int, rate: float
) -> dict[str, Any]:
    """Serve the items by a fresh deployment."""
    stack = Replicas(
        "demo",
        num_routers,
        prefill=[()] * WORKERS,
        decode=[()] * WORKERS,
        router=["--policy", policy, "--disaggregation", "always"],
        worker=["--block-size", str(BLOCK), "--num-kv-blocks", str(kv_blocks)],
        transport="auto",
    )
    with stack:
        warm_up = Workload(count=WARM_UP, rate=None).items()
        asyncio.run(_send(stack.urls, warm_up, rate))
        before = _pages(stack)
        results = asyncio.run(_send(stack.urls, items, rate))
        stack.assert_idle()
        after = _pages(stack)

    def grown(role: str, name: str) -> list[float]:
        return [after[w][name] - before[w][name] for w in after if w.startswith(role)]

    ttft = [result.times[0] for result in results if result.times]
    failed = [r for r in results if r.error not in (None, "empty")]  # a lone token may have no text
    looked_up = sum(grown("prefill", "kvferry_prefix_cache_queries_total"))
    found = sum(grown("prefill", "kvferry_prefix_cache_hits_total"))
    return {
        "failed": len(failed),
        "failures": failures(failed),
        "hit_rate": found / looked_up,
        "ttft_p50_ms": 1e3 * float(np.percentile(ttft, 50)),
        "ttft_p99_ms": 1e3 * float(np.percentile(ttft, 99)),
        "prefill_load": spread(grown("prefill", "kvferry_prompt_tokens_computed_total")),
        "decode_load": spread(grown("decode", "kvferry_generation_tokens_total")),
    }


def failures(failed: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """How many failed of each kind, most first, and what one of them was told."""
    counts, told = Counter(r.error for r in failed), {r.error: r.message for r in failed}
    return {
        str(kind): {"count": count, "such_as": told[kind]} for kind, count in counts.most_common()
    }


async def _send(urls: Sequence[str], items: Sequence[Item], rate: float) -> list[Result]:
    """Send the items to the routers in turn."""
    clients = [Client(Endpoint(url), "test", "completions", TOKENS) for url in urls]
    shares = [items[number :: len(urls)] for number in range(len(urls))]
    runs = await asyncio.gather(
        *(
            open_loop(client, share, rate / len(urls), lambda: None, lambda _: None)
            for client, share in zip(clients, shares, strict=True)
        )
    )
    for client in clients:
        client.endpoint.close()
    return [result for one in runs for result in one.results]


def _pages(stack: Replicas) -> dict[str, dict[str, float]]:
    return {worker["id"]: scrape(worker["metrics"], stack.client) for worker in stack.workers()}


def _ideal(items: Sequence[Item], kv_blocks: int) -> float:
    prompts = (TOKENS.render(item.prompt) for item in items)
    sampling = SamplingParams(max_tokens=1)
    sequences = (Prompt("", prompt, len(prompt), sampling) for prompt in prompts)
    return ideal_hits(sequences, WORKERS * kv_blocks, BLOCK)


def main(
    trace: Annotated[
        Path | None, typer.Argument(help="Mooncake's JSON lines.", exists=True, dir_okay=False)
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="trace, apart or hot; may be repeated. Default: all.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="The router's; may be repeated. Default: all.")
    ] = None,
    routers: Annotated[list[int] | None, typer.Option(help="May be repeated.", min=1)] = None,
    count: Annotated[int, typer.Option(help="Requests, from the trace's begin.", min=2)] = 400,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1)] = 8.0,
    kv_tokens: Annotated[int, typer.Option(help="KV tokens of a worker.", min=MAX_LEN)] = 65_536,
) -> None:
    """Print a table of each case and write all to bench/results/replay.json."""
    cases, policies = _chosen(get_args(Case), case), _chosen(tuple(POLICIES), policy)
    rows: list[dict[str, Any]] = []
    kv_blocks = kv_tokens // BLOCK
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            items = workload(name, trace, count, rate, Path(folder)).items()
        ideal = _ideal(items, kv_blocks)
        of_case = [
            {
                "case": name,
                "policy": chosen,
                "routers": num_routers,
                "ideal_hit_rate": ideal,
                **run(items, chosen, num_routers, kv_blocks, rate),
            }
            for chosen in policies
            for num_routers in routers or (1,)
        ]
        show(of_case)
        rows += of_case
    RESULTS.mkdir(exist_ok=True)
    settings = {"trace": trace.name if trace else None, "count": count, "rate": rate}
    record = {"settings": {**settings, "kv_tokens": kv_tokens}, "runs": rows}
    (RESULTS / "replay.json").write_text(json.dumps(record, indent=1) + "\n")


def _chosen(known: tuple[Name, ...], names: list[str] | None) -> list[Name]:
    """Those of ``known`` that are named, or all. Raises BadParameter."""
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return [name for name in known if not names or name in names]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a case's runs as a table, and below it why requests failed."""
    columns = [name for name in rows[0] if name != "failures"]
    table, console = Table(*(name.replace("_", " ") for name in columns)), Console(width=140)
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in values))
    console.print(table)
    for row in rows:
        for kind, seen in row["failures"].items():
            run = f"{row['policy']}, {row['routers']} routers"
            console.print(f"{run}: {seen['count']} x {kind}, such as: {seen['such_as']}")


if __name__ == "__main__":
    typer.run(main)
