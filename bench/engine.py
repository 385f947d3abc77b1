"""The engine alone, against what the machine can do: rates, and a decode step's budget.

    python -m bench.models FOLDER
    python -m bench.engine FOLDER --threads 2

Decode: every sequence one token a step, from ``context`` tokens on. Prefill: one prompt in chunks.
A step has two parts, the linear layers and attention, each of which needs what the other has just
computed. A part takes at least its bytes (weights or KV) over the memory bandwidth, and at least
its arithmetic (two operations for each weight and token, four for each number of a key and token)
over the rate of a large matrix product. A step's floor is the sum of what its parts take at least;
its overlapped floor would hold if all of its bytes could be read beside all of its arithmetic.

The two rates are measured before and after every round of steps, as a machine's speed may change
from one second to the next. Figures are medians over the rounds, ratios those of each round.
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
READ_BYTES = 512 << 20  # of the bandwidth measurement; far more than caches hold
BLOCK_SIZE = 16  # tokens
TABLE_WIDTH = 120  # at least, also where nothing is known of the terminal
MATRIX = 2048  # of the product that measures arithmetic
SAMPLES = 3  # of either rate in a measurement
STEPS = 4  # decode steps in a round


@dataclass(frozen=True, slots=True)
class Floors:
    """What the machine can do."""

    read_bytes: float  # a second, all threads
    flops: float  # a second, in the model's type

    def mean(self, other: Floors) -> Floors:
        """Of two measurements."""
        return Floors((self.read_bytes + other.read_bytes) / 2, (self.flops + other.flops) / 2)


@dataclass(frozen=True, slots=True)
class Part:
    """What a part of a step must do."""

    num_bytes: int  # to read
    operations: int

    def seconds(self, floors: Floors) -> float:
        """At least."""
        return max(self.num_bytes / floors.read_bytes, self.operations / floors.flops)


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure."""

    name: str
    step: Callable[[], None]
    repeats: int  # in a round
    tokens: int  # that a step computes
    dense: Part
    attention: Part


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    threads: Annotated[int, typer.Option(help="Threads of the engine.", min=1)] = 2,
    sequences: Annotated[list[int], typer.Option(help="Decode batch sizes.")] = [1, 8, 32],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Decode contexts.")] = [512, 2048],  # noqa: B006
    prompts: Annotated[list[int], typer.Option(help="Prompt lengths.")] = [512, 4096],  # noqa: B006
    chunk: Annotated[int, typer.Option(help="Prompt tokens of a prefill step.", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="Rounds of a case.", min=1)] = 5,
    name: Annotated[str, typer.Option(help="Results go to engine-NAME.json.")] = "cpu",
) -> None:
    """Measure every case and print it beside its floor."""
    most_steps = 2 * STEPS * (rounds + 1)  # in the rounds, before them and for the budget
    decoded, prompted = max(contexts) + most_steps, max(prompts)
    tokens = max(max(sequences) * decoded, prompted)
    engine = load(model, threads, tokens, max(decoded, prompted))
    measure = floors_meter(engine.rows.dtype)
    cases = [
        decode(engine, count, context, most_steps) for context in contexts for count in sequences
    ]
    cases += [prefill(engine, prompt, chunk) for prompt in prompts]
    rows = [measured(case, measure, rounds) for case in track(cases, description="cases")]
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__}
    machine |= {"cores": str(os.cpu_count()), "kernel": platform.release(), "threads": str(threads)}
    record = {"machine": machine, "model": Path(model).name, "cases": rows}
    (RESULTS / f"engine-{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load(model: str, threads: int, tokens: int, longest: int) -> Engine:
    """The engine with room for ``tokens`` tokens of KV, ``longest`` of one sequence.

    All of the KV is written: memory that never was is one page of zeros, which the caches hold.
    """
    engine = Engine.load(
        EngineConfig(
            model=model,
            num_threads=threads,
            block_size=BLOCK_SIZE,
            num_blocks=-(-tokens // BLOCK_SIZE) + 64,
            max_model_len=longest,
        )
    )
    engine.rows.fill_(1)
    return engine


def floors_meter(dtype: torch.dtype) -> Callable[[], Floors]:
    """What measures read bandwidth and matrix product rate of the processor, a median of each."""
    lanes = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    left = torch.ones(MATRIX, MATRIX, dtype=dtype)

    def measure() -> Floors:
        read = statistics.median(seconds_of(lanes.sum) for _ in range(SAMPLES))
        product = statistics.median(seconds_of(lambda: left @ left) for _ in range(SAMPLES))
        return Floors(READ_BYTES / read, 2 * MATRIX**3 / product)

    return measure


def num_weights(model: ModelConfig) -> int:
    """Numbers in the matrices that every decode step reads: the layers and the head."""
    queries, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = (queries + 2 * kv) * model.hidden_size + queries * model.hidden_size
    layer += 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def attention_operations(model: ModelConfig, scores: int) -> int:
    """Four for each number of a query and key: two for its score, two for its value."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * scores


def dense_prefill_operations(model: ModelConfig, tokens: int) -> int:
    """Of one prompt: two for each weight and token; the head once."""
    head = model.vocab_size * model.hidden_size
    return 2 * tokens * (num_weights(model) - head) + 2 * head


def prefill_operations(model: ModelConfig, tokens: int) -> int:
    """Of one prompt, all of them."""
    scores = tokens * tokens // 2
    return dense_prefill_operations(model, tokens) + attention_operations(model, scores)


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode(engine: Engine, count: int, context: int, most_steps: int) -> Case:
    """A step of ``count`` sequences, each time of one token more."""
    blocks_each = engine.geometry.blocks_for(context + most_steps)
    sampling = SamplingParams(max_tokens=most_steps, temperature=0.0)
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
        sequence.num_computed = context - 1

    def step() -> None:
        batch = Batch(tuple(BatchRow(s, s.num_computed, 1) for s in running))
        for sequence, token_id in zip(running, engine.run(batch).token_ids, strict=True):
            sequence.num_computed += 1
            sequence.token_ids.append(token_id)

    weights, keys = num_weights(engine.model_config), count * context
    row_bytes = engine.geometry.row_bytes // engine.geometry.block_size
    return Case(
        f"decode {count} @ {context}",
        step,
        STEPS,
        count,
        Part(weights * engine.rows.element_size(), 2 * count * weights),
        Part(keys * row_bytes, attention_operations(engine.model_config, keys)),
    )


def prefill(engine: Engine, tokens: int, chunk: int) -> Case:
    """One prompt in chunks, alone; all of its chunks count as one step."""
    token_ids = prompt(engine, 0, tokens)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    blocks = list(range(engine.geometry.blocks_for(tokens)))

    def step() -> None:
        sequence = Sequence("0", list(token_ids), tokens, sampling, blocks)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            engine.run(Batch((BatchRow(sequence, start, count),)))
            sequence.num_computed = start + count

    model, row_bytes = engine.model_config, engine.geometry.row_bytes // engine.geometry.block_size
    weight_bytes = num_weights(model) * engine.rows.element_size() * -(-tokens // chunk)
    keys = sum(min(start + chunk, tokens) for start in range(0, tokens, chunk))
    return Case(
        f"prefill {tokens}",
        step,
        1,
        tokens,
        Part(weight_bytes, dense_prefill_operations(model, tokens)),
        Part(keys * row_bytes, attention_operations(model, tokens * tokens // 2)),
    )


def measured(case: Case, measure: Callable[[], Floors], rounds: int) -> dict[str, Any]:
    """A case's figures: medians over ``rounds`` of its steps and of the machine, in turns."""
    both = Part(
        case.dense.num_bytes + case.attention.num_bytes,
        case.dense.operations + case.attention.operations,
    )
    case.step()
    figures: dict[str, list[float]] = {}
    before = measure()
    for _ in range(rounds):
        seconds = statistics.median(seconds_of(case.step) for _ in range(case.repeats))
        after = measure()
        floors = before.mean(after)
        before = after
        floor = case.dense.seconds(floors) + case.attention.seconds(floors)
        for name, value in {
            "tokens_per_s": case.tokens / seconds,
            "step_ms": seconds * 1e3,
            "floor_ms": floor * 1e3,
            "of_floor": floor / seconds,
            "of_overlapped": both.seconds(floors) / seconds,
            "read_GB_s": floors.read_bytes / 1e9,
            "GFLOP_s": floors.flops / 1e9,
        }.items():
            figures.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {"case": case.name, **medians, "budget_ms": budget(case.step, case.repeats)}


def prompt(engine: Engine, number: int, tokens: int) -> list[int]:
    """Token ids, other ones for each ``number``."""
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(engine.model_config.vocab_size, (tokens,), generator=random)
    return list(ids.tolist())


def budget(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Milliseconds of one step in each phase, from a trace; dense is the forward pass without its
    attention, host what no phase explains. A decode step that is traced calls its kernels one by
    one, which takes some milliseconds more.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = sum(seconds_of(step) for _ in range(repeats))
    spent = {event.key: event.cpu_time_total / 1e3 / repeats for event in profile.key_averages()}
    spent["dense"] = spent["forward"] - spent["attention"]
    parts = {name: spent[name] for name in PHASES if name != "host"}
    return {**parts, "host": seconds * 1e3 / repeats - sum(parts.values())}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    columns = {"tokens/s": "tokens_per_s", "ms": "step_ms", "floor ms": "floor_ms"}
    ratios = {"of floor": "of_floor", "of overlapped": "of_overlapped"}
    rates = {"GB/s": "read_GB_s", "GFLOP/s": "GFLOP_s"}
    table = Table("case", *columns, *ratios, *rates, *PHASES)
    for row in rows:
        texts = [f"{row[name]:.1f}" for name in columns.values()]
        texts += [f"{row[name]:.2f}" for name in ratios.values()]
        texts += [f"{row[name]:.0f}" for name in rates.values()]
        table.add_row(row["case"], *texts, *(f"{value:.1f}" for value in row["budget_ms"].values()))
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


if __name__ == "__main__":
    typer.run(main)
