"""The engine alone, against what the machine can do: rates, and a decode step's budget.

    python -m bench.models FOLDER
    python -m bench.engine FOLDER --threads 2

Decode: every sequence one token a step, from ``context`` tokens on. Prefill: one prompt in chunks.
Decode is held against the bytes it must read (weights and KV) over the memory bandwidth, prefill
against its arithmetic (two operations for each weight and token, four for each score) over the
rate of a large matrix product; both are measured in the same run, before and after.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.batch import Batch, BatchRow
from engine.config import ModelConfig
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

RESULTS = Path(__file__).parent / "results"
PHASES = ("prepare", "attention", "dense", "sample", "host")
COPY_BYTES = 512 << 20  # of the bandwidth measurement; far more than caches hold
BLOCK_SIZE = 16  # tokens
TABLE_WIDTH = 110  # at least, also where nothing is known of the terminal
MATRIX = 4096  # of the product that measures arithmetic


@dataclass(frozen=True, slots=True)
class Floors:
    """What the machine can do."""

    read_bytes: float  # a second, all threads
    flops: float  # a second, in the model's type

    def best_of(self, other: Floors) -> Floors:
        """The higher of two measurements: disturbance only lowers them."""
        return Floors(max(self.read_bytes, other.read_bytes), max(self.flops, other.flops))


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    threads: Annotated[int, typer.Option(help="Threads of the engine.", min=1)] = 2,
    sequences: Annotated[list[int], typer.Option(help="Decode batch sizes.")] = [1, 8, 32],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Decode contexts.")] = [512, 2048],  # noqa: B006
    prompts: Annotated[list[int], typer.Option(help="Prompt lengths.")] = [512, 4096],  # noqa: B006
    chunk: Annotated[int, typer.Option(help="Prompt tokens of a prefill step.", min=1)] = 512,
    steps: Annotated[int, typer.Option(help="Measured decode steps of a case.", min=5)] = 20,
    name: Annotated[str, typer.Option(help="Results go to engine-NAME.json.")] = "cpu",
) -> None:
    """Measure every case and print it beside its floor."""
    longest = max(max(contexts) + 4 * steps, max(prompts))
    engine = load(model, threads, max(sequences) * longest, longest)
    weights = num_weights(engine.model_config)
    floors = measure_floors(engine.rows.dtype)
    cases = [("decode", count, context) for context in contexts for count in sequences]
    cases += [("prefill", 1, prompt) for prompt in prompts]
    rows = []
    for kind, count, context in track(cases, description="cases"):
        if kind == "decode":
            rows.append(decode(engine, weights, count, context, steps))
        else:
            rows.append(prefill(engine, weights, context, chunk))
    floors = floors.best_of(measure_floors(engine.rows.dtype))
    for row in rows:
        floor = max(row["bytes"] / floors.read_bytes, row["operations"] / floors.flops)
        row["floor_ms"] = floor * 1e3
        row["of_floor"] = row["floor_ms"] / row["step_ms"]
    show(rows, floors)
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__}
    machine |= {"cores": str(os.cpu_count()), "kernel": platform.release(), "threads": str(threads)}
    figures = {"read_GB_s": floors.read_bytes / 1e9, "GFLOP_s": floors.flops / 1e9}
    record = {"machine": machine, "model": Path(model).name, "floors": figures, "cases": rows}
    (RESULTS / f"engine-{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load(model: str, threads: int, tokens: int, longest: int) -> Engine:
    """The engine with room for ``tokens`` tokens of KV, ``longest`` of one sequence."""
    return Engine.load(
        EngineConfig(
            model=model,
            num_threads=threads,
            block_size=BLOCK_SIZE,
            num_blocks=-(-tokens // BLOCK_SIZE) + 64,
            max_model_len=longest,
        )
    )


def measure_floors(dtype: torch.dtype) -> Floors:
    """Read bandwidth and matrix product rate of the processor, the best of several."""
    lanes = torch.ones(COPY_BYTES // 8, dtype=torch.int64)
    left = torch.ones(MATRIX, MATRIX, dtype=dtype)
    read = min(seconds_of(lanes.sum) for _ in range(5))
    product = min(seconds_of(lambda: left @ left) for _ in range(3))
    return Floors(COPY_BYTES / read, 2 * MATRIX**3 / product)


def num_weights(model: ModelConfig) -> int:
    """Numbers in the matrices that every decode step reads: the layers and the head."""
    queries, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = (queries + 2 * kv) * model.hidden_size + queries * model.hidden_size
    layer += 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def prefill_operations(model: ModelConfig, tokens: int) -> int:
    """Of one prompt: two for each weight and token, four for each score; the head once."""
    head = model.vocab_size * model.hidden_size
    scores = model.num_layers * model.num_heads * model.head_dim * tokens * tokens // 2
    return 2 * tokens * (num_weights(model) - head) + 2 * head + 4 * scores


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode(engine: Engine, weights: int, count: int, context: int, steps: int) -> dict[str, Any]:
    """A step of ``count`` sequences: its time, its floor's figures and its budget."""
    blocks_each = engine.geometry.blocks_for(context + 2 * steps + 4)
    sampling = SamplingParams(max_tokens=4 * steps, temperature=0.0)
    running = [
        Sequence(
            str(number),
            prompt(engine, number, context),
            context - 1,
            sampling,
            list(range(number * blocks_each, (number + 1) * blocks_each)),
        )
        for number in range(count)
    ]
    for sequence in running:
        sequence.num_computed = context - 1  # zeros are as good as any KV here

    def step() -> None:
        batch = Batch(tuple(BatchRow(s, s.num_computed, 1) for s in running))
        for sequence, token_id in zip(running, engine.run(batch).token_ids, strict=True):
            sequence.num_computed += 1
            sequence.token_ids.append(token_id)

    for _ in range(3):
        step()
    seconds = statistics.median(seconds_of(step) for _ in range(steps))
    kv_bytes = count * (context + steps) * engine.geometry.row_bytes // engine.geometry.block_size
    return {
        "case": f"decode {count} @ {context}",
        "tokens_per_s": count / seconds,
        "step_ms": seconds * 1e3,
        "bytes": weights * engine.rows.element_size() + kv_bytes,
        "operations": 2 * count * weights,
        "budget_ms": budget(step, max(steps // 4, 3)),
    }


def prefill(engine: Engine, weights: int, tokens: int, chunk: int) -> dict[str, Any]:
    """One prompt in chunks, alone."""
    token_ids = prompt(engine, 0, tokens)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    blocks = list(range(engine.geometry.blocks_for(tokens)))

    def run() -> None:
        sequence = Sequence("0", list(token_ids), tokens, sampling, blocks)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            engine.run(Batch((BatchRow(sequence, start, count),)))
            sequence.num_computed = start + count

    run()
    seconds = statistics.median(seconds_of(run) for _ in range(3))
    return {
        "case": f"prefill {tokens}",
        "tokens_per_s": tokens / seconds,
        "step_ms": seconds * 1e3,
        "bytes": weights * engine.rows.element_size() * -(-tokens // chunk),
        "operations": prefill_operations(engine.model_config, tokens),
        "budget_ms": budget(run, 1),
    }


def prompt(engine: Engine, number: int, tokens: int) -> list[int]:
    """Token ids, other ones for each ``number``."""
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(engine.model_config.vocab_size, (tokens,), generator=random)
    return list(ids.tolist())


def budget(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Milliseconds of one step in each phase, from a trace; dense is the forward pass without its
    attention, host what no phase explains.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = sum(seconds_of(step) for _ in range(repeats))
    spent = {event.key: event.cpu_time_total / 1e3 / repeats for event in profile.key_averages()}
    spent["dense"] = spent["forward"] - spent["attention"]
    parts = {name: spent[name] for name in PHASES if name != "host"}
    return {**parts, "host": seconds * 1e3 / repeats - sum(parts.values())}


def show(rows: list[dict[str, Any]], floors: Floors) -> None:
    """Print a table."""
    title = f"read {floors.read_bytes / 1e9:.1f} GB/s, {floors.flops / 1e9:.0f} GFLOP/s"
    table = Table("case", "tokens/s", "ms", "floor ms", "of floor", *PHASES, title=title)
    for row in rows:
        figures = [row[name] for name in ("tokens_per_s", "step_ms", "floor_ms")]
        parts = [f"{value:.1f}" for value in row["budget_ms"].values()]
        texts = [f"{figure:.1f}" for figure in figures]
        table.add_row(row["case"], *texts, f"{row['of_floor']:.2f}", *parts)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


if __name__ == "__main__":
    typer.run(main)
