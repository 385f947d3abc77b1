"""A whole benchmark: find the model, calibrate, warm up, then one run or a sweep's runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from bench.serving.client import Api, Client, calibrated_words, served_model
from bench.serving.connection import Endpoint
from bench.serving.load import closed_loop, open_loop
from bench.serving.measures import measure
from bench.serving.prompts import TokenIds, Words
from bench.serving.record import Record, Run
from bench.serving.sweep import find_knee
from bench.serving.terminal import Watch, show_point
from bench.serving.workload import Item, Workload
from planner.outcome import Slo
from protocol.errors import ConfigError

WARMUP_CONCURRENCY = 8
WARMUP_SEED = 1_000_003  # added, so that no measured prompt is in a cache yet


@dataclass(frozen=True, slots=True)
class BenchmarkConfig:
    """Everything asked for. An open loop unless ``concurrency`` is given."""

    url: str
    workload: Workload
    slo: Slo
    settings: Mapping[str, str | int | float | bool | None]  # as they go into the record
    token_ids: TokenIds  # of prompts, where the API takes ids
    model: str | None = None  # None: the first that the endpoint lists
    api: Api = "completions"
    api_key: str | None = None
    concurrency: int | None = None
    duration: float | None = None  # seconds of arrivals, instead of the workload's count
    warmup: int = 8  # requests
    sweep: float | None = None  # look for the knee to a factor of 1 + this, from the rate
    timeout: float = 600.0
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


async def benchmark(config: BenchmarkConfig, console: Console) -> Record:
    """Measure. Raises ConfigError when the endpoint is of no use from the start."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    endpoint = Endpoint(config.url, config.api_key)
    try:
        client = Client(
            endpoint=endpoint,
            model=config.model or await served_model(endpoint),
            api=config.api,
            prompts=config.token_ids if config.api == "completions" else Words(),
            timeout=config.timeout,
            ignore_eos=config.ignore_eos,
            extra=config.extra,
        )
        if config.api == "chat":
            client = replace(client, prompts=await calibrated_words(client))
        await _warm_up(client, config, console)
        record = Record(config.url, client.model, started, config.settings, config.slo, ())
        if config.sweep is None:
            return replace(record, runs=(await _run(client, config, config.workload, console),))
        return await _sweep(client, config, config.sweep, record, console)
    finally:
        endpoint.close()


async def _sweep(
    client: Client, config: BenchmarkConfig, tolerance: float, record: Record, console: Console
) -> Record:
    start = config.workload.rate
    if start is None:
        raise ConfigError("a sweep needs a --rate to start from")
    runs: list[Run] = []

    async def holds(rate: float) -> bool:
        seed = config.workload.seed + len(runs)  # new prompts: no point finds another's in a cache
        workload = replace(config.workload, rate=rate, seed=seed)
        run = await _run(client, config, workload, console)
        runs.append(run)
        show_point(console, run, config.slo)
        return measure(run, config.slo).attainment >= config.slo.attainment

    knee = await find_knee(holds, start, tolerance)
    return replace(record, runs=tuple(runs), knee=knee)


async def _run(
    client: Client, config: BenchmarkConfig, workload: Workload, console: Console
) -> Run:
    if config.duration is not None and workload.rate is not None:
        workload = replace(workload, count=max(2, math.ceil(config.duration * workload.rate)))
    items = workload.items()
    closed = config.concurrency
    title = f"{workload.rate or 0:.3g}/s" if closed is None else f"{closed} at once"
    with Watch(console, title, len(items)) as watch:
        if closed is not None:
            return await closed_loop(client, items, closed, watch.sent, watch.done)
        return await open_loop(client, items, workload.rate, watch.sent, watch.done)


async def _warm_up(client: Client, config: BenchmarkConfig, console: Console) -> None:
    if not config.warmup:
        return
    workload = config.workload
    items: list[Item] = replace(workload, seed=workload.seed + WARMUP_SEED).items()
    items = items[: config.warmup]
    with Watch(console, "warm-up", len(items)) as watch:
        run = await closed_loop(client, items, WARMUP_CONCURRENCY, watch.sent, watch.done)
    failed = [result for result in run.results if result.error is not None]
    if len(failed) == len(items):
        raise ConfigError(f"no warm-up request succeeds: {failed[0].error}: {failed[0].message}")
