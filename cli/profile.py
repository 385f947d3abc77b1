"""``kvferry profile``: times an engine's prefill and decode steps, for ``kvferry plan``.

The steps' KV is zeros and the tokens are all alike: neither changes how long a step takes.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from cli.checkpoint import locate
from cli.options import (
    BlockSize,
    Device,
    Dtype,
    EnforceEager,
    Model,
    Quantization,
    WireQuantization,
)
from planner.fit import StepSample, fit_latency, relative_errors
from planner.profile import Link, WorkerProfile
from protocol.errors import KvferryError
from protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from engine.batch import BatchRow
    from engine.engine import Engine

SMALLEST_BLOCK = 16  # tokens: of the devices' default block sizes, which decides on the memory
WARM_UP = 2  # steps of each case that are not timed


def profile(
    output: Annotated[Path, typer.Argument(help="The profile's file, JSON.")],
    model: Model = "demo",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    block_size: BlockSize = None,
    enforce_eager: EnforceEager = False,
    wire_quantization: WireQuantization = "none",
    threads: Annotated[
        int | None, typer.Option(help="Threads of a CPU engine. Default: torch's choice.", min=1)
    ] = None,
    chunks: Annotated[list[int], typer.Option(help="Prompt tokens of a step.", min=1)] = [  # noqa: B006
        64,
        256,
        512,
    ],
    histories: Annotated[list[int], typer.Option(help="Tokens before the chunk.", min=0)] = [  # noqa: B006
        0,
        1024,
    ],
    batches: Annotated[list[int], typer.Option(help="Decode rows.", min=1)] = [1, 4, 16],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Tokens of a row.", min=1)] = [128, 1024],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Timed steps of a case.", min=3)] = 7,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens that a worker's KV memory will hold.", min=1)
    ] = 65536,
    link_gbps: Annotated[
        float, typer.Option(help="Gigabits a second between two workers.", min=0.001)
    ] = 10.0,
    link_latency: Annotated[
        float, typer.Option(help="Milliseconds from the last byte sent to admission.", min=0)
    ] = 2.0,
) -> None:
    """Time the steps of one worker's engine and fit the planner's latency model to them."""
    from engine.engine import Engine, EngineConfig

    longest = max(*contexts, max(chunks) + max(histories))
    size = block_size or SMALLEST_BLOCK
    config = EngineConfig(
        model=locate(model),
        device=device,
        dtype=dtype,
        quantization=quantization,
        block_size=block_size,
        max_model_len=longest,
        num_blocks=max(batches) * -(-longest // size),
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(chunks),
        decode_graphs=not enforce_eager,
        num_threads=threads,
        wire_quantization=wire_quantization,
    )
    cases = [(chunk, history, 0) for history in histories for chunk in chunks]
    cases += [(1, context - 1, batch) for context in contexts for batch in batches]
    try:
        engine = Engine.load(config)
        console = Console(stderr=True)
        samples = [
            _time_case(engine, *case, repeats)
            for case in track(cases, "timing steps", console=console)
        ]
        latency = fit_latency(samples)
    except KvferryError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    worker = WorkerProfile(
        name=Path(model).name,
        latency=latency,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=engine.fingerprint.wire_bytes // engine.geometry.block_size,
        link=Link(bytes_per_second=link_gbps * 1e9 / 8, latency=link_latency / 1e3),
    )
    output.write_text(worker.model_dump_json(indent=1) + "\n")
    off = abs(relative_errors(latency, samples))
    sys.stdout.write(
        f"{output}: {len(samples)} kinds of step, off by {statistics.median(off):.1%} in the "
        f"median and {max(off):.1%} at most\n"
    )


def _time_case(engine: Engine, tokens: int, history: int, batch: int, repeats: int) -> StepSample:
    """The median time of a step of ``batch`` rows, or of one chunk where ``batch`` is 0."""
    from engine.batch import Batch

    rows = _rows(engine, tokens, history, batch or 1)
    times = []
    for _ in range(WARM_UP + repeats):
        started = time.perf_counter()
        engine.run(Batch(rows))
        times.append(time.perf_counter() - started)
    end = history + tokens
    seconds = statistics.median(times[WARM_UP:])
    if batch:
        return StepSample(0, 0, batch, batch * end, seconds)
    return StepSample(tokens, end**2 - history**2, 0, 0, seconds)


def _rows(engine: Engine, tokens: int, history: int, count: int) -> tuple[BatchRow, ...]:
    """``count`` rows alike, each with blocks of its own. The same step may run again and again."""
    from engine.batch import BatchRow
    from engine.sequence import Sequence

    blocks = engine.geometry.blocks_for(history + tokens)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return tuple(
        BatchRow(
            Sequence(
                str(number),
                [number % engine.model_config.vocab_size] * (history + tokens),
                history + tokens,
                sampling,
                list(range(number * blocks, (number + 1) * blocks)),
                num_computed=history,
            ),
            history,
            tokens,
        )
        for number in range(count)
    )
