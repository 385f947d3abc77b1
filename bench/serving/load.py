"""Puts a workload on an endpoint: open loop, at each request's time, or closed, so many at once.

An open loop never waits for answers, so a slow endpoint meets the same load as a fast one. How
late the client itself was is recorded with each request, and how late its event loop was beside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from bench.serving.client import Client
from bench.serving.record import ClientLoad, Result, Run
from bench.serving.workload import Item

TICK = 0.005  # seconds between two looks at the event loop's lateness
LEAD = 0.05  # seconds from the start to the first arrival

OnResult = Callable[[Result], None]
OnSent = Callable[[], None]


async def open_loop(
    client: Client, items: Sequence[Item], rate: float | None, sent: OnSent, done: OnResult
) -> Run:
    """Send every item at its arrival. ``rate`` is only noted."""
    bodies = [client.body(item) for item in items]
    async with _watched() as load, asyncio.TaskGroup() as tasks:
        start = time.perf_counter() + LEAD

        async def one(index: int) -> Result:
            sent()
            due = start + items[index].arrival
            result = await client.ask(index, items[index], bodies[index], start, due)
            done(result)
            return result

        asked = []
        for index, item in enumerate(items):
            await asyncio.sleep(max(0.0, start + item.arrival - time.perf_counter()))
            asked.append(tasks.create_task(one(index)))
    return Run(rate, tuple(task.result() for task in asked), load())


async def closed_loop(
    client: Client, items: Sequence[Item], concurrency: int, sent: OnSent, done: OnResult
) -> Run:
    """Keep ``concurrency`` requests under way until all are sent; arrivals are not looked at."""
    bodies = [client.body(item) for item in items]
    results: list[Result] = []
    waiting = iter(range(len(items)))
    async with _watched() as load, asyncio.TaskGroup() as tasks:
        start = time.perf_counter()

        async def user(indices: Iterator[int]) -> None:
            for index in indices:
                sent()
                due = time.perf_counter()
                result = await client.ask(index, items[index], bodies[index], start, due)
                done(result)
                results.append(result)

        for _ in range(min(concurrency, len(items))):
            tasks.create_task(user(waiting))
    return Run(None, tuple(sorted(results, key=lambda result: result.index)), load())


@asynccontextmanager
async def _watched() -> AsyncIterator[Callable[[], ClientLoad]]:
    """What yields the client's own load once the context was left."""
    late: list[float] = [0.0]

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    wall, cpu = time.perf_counter(), time.process_time()
    loads: list[ClientLoad] = []
    try:
        yield lambda: loads[0]
    finally:
        ticking.cancel()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loads.append(ClientLoad(wall, cpu, float(np.percentile(late, 99)), max(late)))
