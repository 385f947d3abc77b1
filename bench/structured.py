"""What structured output costs: the masks themselves, and what a decode step loses by them.

    python -m bench.structured

Masks: one step's, for sequences that each follow a schema along random allowed tokens, over a
made-up vocabulary of byte strings. They are computed beside the forward pass. Steps: the demo
model's decode step with and without a grammar, in turn, so that both see the same machine.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.grammar import Grammars, Masks
from engine.sequence import Sequence
from protocol.sampling import Grammar, SamplingParams

DEMO = Path(__file__).parent.parent / "cli" / "demo_model"
EOS = "<|eos|>"
CONTEXT = 64  # tokens of each prompt
BLOCK_SIZE = 16
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "places": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "born", "tags", "places"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))


def main(
    rows: Annotated[list[int], typer.Option(help="Sequences of a step.")] = [1, 8, 32],  # noqa: B006
    vocabulary: Annotated[int, typer.Option(help="Tokens of the masks.", min=300)] = 128_000,
    steps: Annotated[int, typer.Option(help="Measured steps of a case.", min=10)] = 100,
    threads: Annotated[int, typer.Option(help="Threads of the engine.", min=1)] = 1,
) -> None:
    """Print the medians."""
    table = Table(title="milliseconds a step, median")
    for column in ("sequences", f"masks of {vocabulary} tokens", "demo step", "with grammar"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        end = write_tokenizer(Path(directory), vocabulary)
        grammars = Grammars(Path(directory), vocabulary, (end,))
        started = time.perf_counter()
        grammars.expect(GRAMMAR).result()
        compiled = time.perf_counter() - started
        masks = {count: masks_ms(grammars, end, count, steps) for count in rows}
    engine = Engine.load(
        EngineConfig(
            model=str(DEMO), num_threads=threads, block_size=BLOCK_SIZE, device="cpu",
            num_blocks=2 * max(rows) * blocks_each(steps) + 256,
        )
    )  # fmt: skip
    for count in rows:
        free, bound = step_ms(engine, count, steps)
        table.add_row(str(count), f"{masks[count]:.3f}", f"{free:.3f}", f"{bound:.3f}")
    console = Console()
    console.print(table)
    console.print(f"first grammar, tokenizer included: {compiled:.2f} s")


def write_tokenizer(folder: Path, size: int) -> int:
    """A byte-level BPE tokenizer of random merges of what JSON is made of; the id of its EOS."""
    rng = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(tokens), []
    letters = list('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.,:"{}[]ĠĊ')
    words = list(letters)
    while len(tokens) < size - 1:
        left, right = rng.choice(words), rng.choice(letters)
        if len(left) < 12 and left + right not in known:
            merges.append((left, right))
            known.add(left + right)
            words.append(left + right)
            tokens.append(left + right)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(EOS)
    assert end is not None
    return end


def masks_ms(grammars: Grammars, end: int, count: int, steps: int) -> float:
    """One step's masks for ``count`` sequences; those that end begin again."""
    sampling = SamplingParams(max_tokens=10**6, grammar=GRAMMAR, stop_token_ids=(end,))
    rng = np.random.default_rng(0)
    sequences = [Sequence("", [], 0, sampling) for _ in range(count)]

    def step() -> Masks:
        pending = grammars.masks(sequences)
        assert pending is not None
        return pending.result()

    times = []
    for _ in range(steps):
        start = time.perf_counter()
        masks = step()
        times.append(time.perf_counter() - start)
        allowed = np.unpackbits(masks.bits.view(np.uint8), axis=1, bitorder="little")
        for index, row in enumerate(allowed):
            token_id = int(rng.choice(np.flatnonzero(row)))
            if token_id == end:
                sequences[index] = Sequence("", [], 0, sampling)
            else:
                sequences[index].token_ids.append(token_id)
    return statistics.median(times) * 1e3


def blocks_each(steps: int) -> int:
    """Of one sequence."""
    return -(-(CONTEXT + steps + 8) // BLOCK_SIZE)


def step_ms(engine: Engine, count: int, steps: int) -> tuple[float, float]:
    """A decode step of ``count`` sequences, without a grammar and with one."""
    end = engine.model_config.eos_token_ids[0]
    free = SamplingParams(max_tokens=10**6, seed=1)
    # Far from its end: the sequences must not finish while they are measured.
    bound = free.model_copy(
        update={"grammar": GRAMMAR, "stop_token_ids": (end,), "min_tokens": 10**6}
    )
    kinds = []
    for offset, sampling in enumerate((free, bound)):
        first, each = offset * count * blocks_each(steps), blocks_each(steps)
        kinds.append(
            [
                Sequence(
                    f"{number}", [5] * CONTEXT, CONTEXT, sampling,
                    list(range(first + number * each, first + (number + 1) * each)),
                )
                for number in range(count)
            ]
        )  # fmt: skip
    for sequences in kinds:
        advance(engine, sequences)  # the prompts
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for sequences, into in zip(kinds, times, strict=True):
            into.append(seconds_of(partial(advance, engine, sequences)))
    without, with_grammar = (statistics.median(some) * 1e3 for some in times)
    return without, with_grammar


def advance(engine: Engine, sequences: list[Sequence]) -> None:
    """One step of every sequence."""
    rows = (BatchRow(s, s.num_computed, s.num_tokens - s.num_computed) for s in sequences)
    output = engine.run(Batch(tuple(rows)))
    assert not output.failures, output.failures
    for sequence, token_id in zip(sequences, output.token_ids, strict=True):
        sequence.num_computed = sequence.num_tokens
        sequence.token_ids.append(token_id)


def seconds_of(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
