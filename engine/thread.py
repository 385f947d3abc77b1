"""Runs steps on the one thread that touches the model, so that the event loop never waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from engine.batch import Batch, StepOutput
from engine.sequence import Sequence
from engine.step_sums import StepTimes
from protocol.sampling import Grammar, SamplingParams

FORGET = 0.99  # what a step makes of the longest before it: some stall is no measure for ever


class Runs(Protocol):
    """What computes a batch: ``Engine``, or a stand-in where no model is wanted."""

    def run(self, batch: Batch) -> StepOutput:
        """One new token for each of the batch's sampling rows, in order."""
        ...

    def expect(self, grammar: Grammar) -> None:
        """Begin to compile a grammar that a later batch needs."""
        ...

    @property
    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds of the last step's phases."""
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
        self._phase_seconds = Histogram(
            "kvferry_engine_phase_seconds",
            "Time of one phase of a step: prepare, forward, sample; and of the gap before a step "
            "that goes on with sequences of the one before",
            labelnames=("phase",),
            registry=registry,
            buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2),
        )
        self.steps = StepTimes()
        self._started: float | None = None  # time.perf_counter() of the running step's start
        self._ended = 0.0  # and of the last step's end
        self.longest = 0.0  # seconds of the longest step of late
        self._last_sequences: set[Sequence] = set()  # of the last step
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

    def expect(self, sampling: SamplingParams) -> None:
        """Prepare what a request needs before its first step."""
        if sampling.grammar is not None:
            self._engine.expect(sampling.grammar)

    def run(self, batch: Batch) -> Awaitable[StepOutput]:
        """Start a step now. Await one new token for each of its sampling rows, in order."""
        self._started = started = time.perf_counter()
        loop = asyncio.get_running_loop()
        step = loop.run_in_executor(self._executor, self._engine.run, batch)
        return self._finish(batch, step, started)

    async def _finish(
        self, batch: Batch, step: Awaitable[StepOutput], started: float
    ) -> StepOutput:
        output = await step
        self._started = None
        self._time(batch, started)
        self._count(batch)
        return output

    @property
    def running_for(self) -> float:
        """Seconds that the step under way has taken; 0 without one. From any thread."""
        started = self._started
        return 0.0 if started is None else time.perf_counter() - started

    def close(self) -> None:
        """End the thread after the step it is running."""
        self._executor.shutdown()

    def _time(self, batch: Batch, started: float) -> None:
        sequences = {row.sequence for row in batch.rows}
        began = started
        if not sequences.isdisjoint(self._last_sequences):
            began = self._ended  # the gap is part of what each token of a sequence takes
            self._phase_seconds.labels("gap").observe(started - began)
        for phase, seconds in self._engine.phase_seconds.items():
            self._phase_seconds.labels(phase).observe(seconds)
        self._last_sequences, self._ended = sequences, time.perf_counter()
        self._seconds.observe(self._ended - started)
        self.steps.add(batch, self._ended - began)
        self.longest = max(FORGET * self.longest, self._ended - started)

    def _count(self, batch: Batch) -> None:
        for row in batch.rows:
            if row.sequence.recomputed:
                again = row.num_tokens - (1 if row.samples else 0)
                self._recomputed_tokens.inc(again)
            else:
                prompt = min(row.end, row.sequence.num_prompt_tokens) - row.start
                self._prompt_tokens.inc(max(0, prompt))
        self._generated_tokens.inc(len(batch.sampling_rows))
