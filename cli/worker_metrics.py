"""A worker's gauges and counters, read from its live state at every scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cli.role_runner import RoleRunner
from engine.block_pool import BlockPool
from kvtransfer.metrics import transfer_metrics
from kvtransfer.thread import TransferThread

SCRAPE_TIMEOUT = 5.0  # seconds; a scrape that fails says that the event loop hangs


class WorkerCollector(Collector):
    """Names follow vLLM's where they mean the same, with the prefix ``kvferry_``."""

    def __init__(
        self,
        role: RoleRunner,
        pool: BlockPool,
        block_bytes: int,
        transfer: TransferThread,
    ) -> None:
        self._role = role
        self._pool = pool
        self._block_bytes = block_bytes
        self._transfer = transfer
        self._loop = asyncio.get_running_loop()  # owns all that is read here

    def collect(self) -> Iterator[Metric]:
        """The worker's state now; called on the HTTP server's threads."""
        snapshot = asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop)
        yield from snapshot.result(SCRAPE_TIMEOUT)

    async def _snapshot(self) -> list[Metric]:
        return list(self._state())

    def _state(self) -> Iterator[Metric]:
        load = self._role.load()
        for name, help_text, value in (
            ("num_requests_running", "Requests in the running batch", load.num_running),
            ("num_requests_waiting", "Requests queued", load.num_waiting),
            ("kv_grants_open", "Grants that are not over", load.open_grants),
            ("kv_leases_open", "Hand-offs that are not over", load.open_leases),
            ("kv_block_bytes", "Bytes of one KV block", self._block_bytes),
            ("kv_blocks", "KV blocks of the pool", load.total_blocks),
            ("kv_blocks_used", "KV blocks with a reference", load.total_blocks - load.free_blocks),
            (
                "kv_cache_usage_perc",
                "Used share of the KV blocks, 1 is all",
                (load.total_blocks - load.free_blocks) / load.total_blocks,
            ),
        ):
            yield GaugeMetricFamily(f"kvferry_{name}", help_text, value=value)
        for name, help_text, value in (
            ("prefix_cache_queries", "Tokens looked up in the cache", self._pool.prefix_queries),
            ("prefix_cache_hits", "Tokens found in the cache", self._pool.prefix_hits),
        ):
            yield CounterMetricFamily(f"kvferry_{name}", help_text, value=value)
        yield from transfer_metrics(self._transfer.snapshot(), self._transfer.description)
        yield from self._role.metrics()
