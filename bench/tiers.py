"""Time to first token of a prompt whose KV was evicted: from the disk tier, and computed again.

    python -m bench.tiers demo
    python -m bench.models FOLDER && python -m bench.tiers FOLDER --prompts 256,512

One engine with its scheduler, block pool and disk tier, no router. ``file cache`` reads what the
kernel still has in memory, ``disk`` what it was made to forget. ``saving`` is what the steps of a
new prompt cost while blocks are being saved beside them, against a worker without a tier.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.checkpoint import locate
from engine.block_pool import BlockPool
from engine.engine import Engine, EngineConfig
from engine.rate import Rate
from engine.sequence import Sequence
from engine.tiers.cache import TieredCache
from engine.tiers.copier import BlockCopier
from engine.tiers.disk import DiskTier
from prefill.scheduler import PrefillScheduler
from protocol.sampling import SamplingParams

BLOCK_SIZE, CHUNK = 16, 512  # tokens


class Worker:
    """Computes prompts one after the other; ``directory`` None means without a tier."""

    def __init__(self, engine: Engine, directory: Path | None, num_bytes: int) -> None:
        self.pool = BlockPool(engine.num_blocks, BLOCK_SIZE, engine.salt)
        self.scheduler = PrefillScheduler(self.pool, max_num_batched_tokens=CHUNK, max_num_seqs=1)
        self.cache: TieredCache | None = None
        self._engine = engine
        self._rate = Rate()
        self._changed = asyncio.Event()
        if directory is not None:
            row_bytes = engine.geometry.row_bytes
            disk = DiskTier(directory, num_bytes, row_bytes, engine.salt)
            self.cache = cache = TieredCache(
                self.pool, BlockCopier(engine.rows, disk), [disk], row_bytes
            )
            cache.on_change = self._changed.set
            self.scheduler.may_start = lambda prompt: cache.ready(prompt, self._rate.per_second)

    async def ask(self, tokens: list[int]) -> tuple[float, int]:
        """Seconds to the first token, and how many tokens were cached."""
        sequence = Sequence("prompt", list(tokens), len(tokens), SamplingParams(max_tokens=1))
        began = time.perf_counter()
        self.scheduler.add(sequence)
        self.scheduler.grant("prompt")
        while len(sequence.token_ids) == len(tokens):
            self._changed.clear()
            batch = self.scheduler.schedule()
            if not batch.rows:
                await self._changed.wait()
                continue
            step = time.perf_counter()
            output = await asyncio.to_thread(self._engine.run, batch)
            self._rate.add(batch.num_tokens, time.perf_counter() - step)
            self.scheduler.commit(output.token_ids)
        seconds = time.perf_counter() - began
        self.pool.release_sequence(sequence)
        return seconds, sequence.num_cached

    async def settle(self) -> None:
        """Until all blocks are saved."""
        while self.cache is not None and self.cache.busy:
            self._changed.clear()
            await self._changed.wait()

    def forget(self) -> None:
        """Evict everything from the pool."""
        blocks = self.pool.allocate(self.pool.num_blocks)
        assert blocks is not None, "a prompt still holds blocks"
        self.pool.release(blocks)


async def measure(engine: Engine, length: int, repeats: int, directory: Path) -> list[str]:
    """One row of the table."""
    random = Random(length)
    vocab = engine.model_config.vocab_size

    def prompt() -> list[int]:
        return [random.randrange(vocab) for _ in range(length)]

    num_bytes = 4 * (length // BLOCK_SIZE) * engine.geometry.row_bytes
    plain, tiered = Worker(engine, None, 0), Worker(engine, directory, num_bytes)
    assert tiered.cache is not None
    running = asyncio.create_task(tiered.cache.run())
    await plain.ask(prompt())  # warms up
    cold: list[float] = []
    saving: list[float] = []
    cached: list[float] = []
    read: list[float] = []
    for _ in range(repeats):
        cold.append((await plain.ask(prompt()))[0])
        tokens = prompt()
        saving.append((await tiered.ask(tokens))[0])
        await tiered.settle()
        for forget_file, times in ((False, cached), (True, read)):
            tiered.forget()
            if forget_file:
                _drop_file_cache(directory / "blocks")
            seconds, found = await tiered.ask(tokens)
            assert found >= length - BLOCK_SIZE, "it was computed: loading was predicted slower"
            times.append(seconds)
    running.cancel()
    await asyncio.wait({running})
    loaded = tiered.cache.num_restored * engine.geometry.row_bytes / tiered.cache.load_seconds
    tiered.cache.close()
    again, file_cache, disk = map(statistics.median, (cold, cached, read))
    cost = statistics.median(saving) / again - 1
    return [
        str(length),
        *(f"{1e3 * seconds:.1f}" for seconds in (again, file_cache, disk)),
        f"{again / file_cache:.1f} / {again / disk:.1f}",
        f"{100 * cost:+.0f} %",
        f"{loaded / 1e9:.2f}",
    ]


def _drop_file_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or demo.")],
    prompts: Annotated[str, typer.Option(help="Prompt lengths, with commas.")] = "128,512,1024",
    repeats: Annotated[int, typer.Option(help="Prompts of each length.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of the engine.", min=1)] = 1,
    directory: Annotated[
        Path | None, typer.Option(help="On the disk to measure. Default: the system's temporary.")
    ] = None,
) -> None:
    """Print medians in milliseconds."""
    lengths = [int(length) for length in prompts.split(",")]
    engine = Engine.load(
        EngineConfig(
            model=locate(model),
            num_threads=threads,
            block_size=BLOCK_SIZE,
            num_blocks=2 * max(lengths) // BLOCK_SIZE + 8,
            max_model_len=max(lengths) + 1,
        )
    )
    table = Table(title="TTFT of an evicted prompt, ms")
    for heading in (
        "tokens",
        "computed",
        "file cache",
        "disk",
        "times faster",
        "saving",
        "load GB/s",
    ):
        table.add_column(heading, justify="right")
    for length in lengths:
        with tempfile.TemporaryDirectory(prefix="kvferry-bench-", dir=directory) as tier:
            table.add_row(*asyncio.run(measure(engine, length, repeats, Path(tier))))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
