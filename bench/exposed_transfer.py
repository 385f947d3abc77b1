"""How much of a prompt's KV transfer is not hidden by its prefill.

    python -m bench.exposed_transfer --model FOLDER

Starts ``kvferry serve`` with one prefill and one decode worker, over TCP and then over mapped
memory, and sends prompts of several chunks, one at a time. A chunk's blocks travel while the next
one computes, so only the last chunk's should be waited for. What is exposed is the timeline's
stage ``transfer``: from the end of the last chunk's step until decode has verified all blocks. It
is held against that of a prompt of a single chunk, whose transfer nothing hides.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving

RESULTS = Path(__file__).parent / "results"
TRANSPORTS = {"TCP": "ucx", "mapped memory": "auto"}  # --transport of each
CHUNKS = (1, 2, 4, 8)  # of a prompt
WARM_UP = 2  # rounds that are not counted: they fill KV memory, whose first use is slow
BLOCK_TOKENS = 16
TOKEN_IDS = range(300, 3000)


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    chunk_tokens: Annotated[
        int, typer.Option(help="Prompt tokens of a step.", min=BLOCK_TOKENS)
    ] = 128,
    rounds: Annotated[int, typer.Option(help="Prompts of each length.", min=1)] = 7,
) -> None:
    """Print the figures and write them to bench/results/exposed-transfer.json."""
    longest = (CHUNKS[-1] + 1) * chunk_tokens
    runs = {}
    for name, transport in TRANSPORTS.items():
        options = ["--disaggregation", "always", "--transport", transport]
        options += ["--max-num-batched-tokens", str(chunk_tokens)]
        options += ["--max-model-len", str(longest), "--block-size", str(BLOCK_TOKENS)]
        options += ["--num-kv-blocks", str(2 * longest // BLOCK_TOKENS)]
        with serving(model, *options) as deployment:
            runs[name] = measure(deployment.url, chunk_tokens, rounds)
    show(runs)
    RESULTS.mkdir(exist_ok=True)
    settings = {"model": Path(model).name, "chunk_tokens": chunk_tokens}
    record = {"settings": settings, "unit": "s", "exposed": runs}
    (RESULTS / "exposed-transfer.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(url: str, chunk_tokens: int, rounds: int) -> dict[int, list[float]]:
    """Seconds of exposed transfer of each prompt, by its number of chunks; lengths take turns."""
    rng = random.Random(1)
    exposed: dict[int, list[float]] = {chunks: [] for chunks in CHUNKS}
    with httpx.Client(base_url=url, timeout=120) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        for number in range(WARM_UP + rounds):
            for chunks in CHUNKS:
                prompt = rng.choices(TOKEN_IDS, k=chunks * chunk_tokens)
                body = {"model": name, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body).raise_for_status().json()
                request = client.get(f"/admin/requests/{answer['id']}").json()
                if number >= WARM_UP:
                    exposed[chunks].append(transfer_of(request))
    return exposed


def transfer_of(request: dict[str, Any]) -> float:
    """Seconds of the stage in which a request's last blocks moved and were verified."""
    (sequence,) = request["sequences"]
    (seconds,) = [s["seconds"] for s in sequence["stages"] if s["name"] == "transfer"]
    return float(seconds)


def show(runs: dict[str, dict[int, list[float]]]) -> None:
    """Print medians in milliseconds, and ratios to a single chunk's."""
    table = Table("chunks of a prompt", *map(str, CHUNKS), title="Exposed transfer")
    for name, exposed in runs.items():
        medians = {chunks: statistics.median(values) for chunks, values in exposed.items()}
        cells = (f"{s * 1e3:.2f} ms ({s / medians[1]:.2f})" for s in medians.values())
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
