"""Runs steps on the one thread that touches the model, so that the event loop never waits."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from engine.batch import Batch


class Runs(Protocol):
    """What computes a batch: ``Engine``, or a stand-in where no model is wanted."""

    def run(self, batch: Batch) -> list[int]:
        """One new token for each of the batch's sampling rows, in order."""
        ...


class EngineThread:
    """Awaitable steps. One at a time: the caller awaits a step before it starts the next."""

    def __init__(self, engine: Runs, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._seconds = Histogram(
            "kvferry_engine_step_seconds",
            "Time of one engine step",
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self._prompt_tokens = Counter(
            "kvferry_prompt_tokens_computed",
            "Prompt tokens whose KV this worker computed for the first time",
            registry=registry,
        )
        self._recomputed_tokens = Counter(
            "kvferry_recomputed_tokens",
            "Tokens whose KV this worker computed again after it was given up",
            registry=registry,
        )
        self._generated_tokens = Counter(
            "kvferry_generation_tokens", "Tokens sampled by this worker", registry=registry
        )

    async def run(self, batch: Batch) -> list[int]:
        """One new token for each of the batch's sampling rows, in order."""
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        token_ids = await loop.run_in_executor(self._executor, self._engine.run, batch)
        self._seconds.observe(time.perf_counter() - started)
        self._count(batch)
        return token_ids

    def close(self) -> None:
        """End the thread after the step it is running."""
        self._executor.shutdown()

    def _count(self, batch: Batch) -> None:
        for row in batch.rows:
            if row.sequence.recomputed:
                again = row.num_tokens - (1 if row.samples else 0)
                self._recomputed_tokens.inc(again)
            else:
                prompt = min(row.end, row.sequence.num_prompt_tokens) - row.start
                self._prompt_tokens.inc(max(0, prompt))
        self._generated_tokens.inc(len(batch.sampling_rows))
