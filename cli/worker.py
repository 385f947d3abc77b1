"""The worker process: one engine, one transfer thread, one role, a link to each router."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from cli.addresses import is_local, is_loopback, worker_addresses
from cli.role_runner import RoleRunner
from cli.router_link import RouterLink, send_to
from cli.worker_metrics import WorkerCollector
from cli.worker_status import Readiness, serve_status
from decode.scheduler import DecodeScheduler
from decode.worker import DecodeWorker
from engine.block_pool import BlockPool
from engine.cache_feed import CacheFeed
from engine.engine import Engine, EngineConfig
from engine.memory_ahead import MemoryAhead
from engine.thread import EngineThread
from engine.tiers.cache import TieredCache
from engine.tiers.config import TierConfig, open_tiers
from engine.tiers.copier import BlockCopier
from engine.tiers.metrics import TierCollector
from kvtransfer.arena import packed_layout
from kvtransfer.auto import auto_factory
from kvtransfer.events import Died, TransferEvent
from kvtransfer.thread import TransferThread
from kvtransfer.ucx import UCXTransport, check_transport
from prefill.metrics import PrefillMetrics
from prefill.scheduler import PrefillScheduler
from prefill.worker import PrefillWorker
from protocol.errors import ConfigError, KvferryError
from protocol.link import Server, read_cluster_key
from protocol.logs import about
from protocol.messages import Message, Register, RequestFailed, Role

log = logging.getLogger(__name__)

IDLE_POLL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything a worker is told at start."""

    role: Role
    routers: tuple[str, ...]  # ZMQ endpoints
    engine: EngineConfig
    worker_id: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    host: str | None = None  # on which peers find this worker
    control_port: int = 0  # this and the next two: 0 takes any free one
    data_port: int = 0
    metrics_port: int = 0
    cluster_key_file: Path | None = None
    transport: Literal["auto", "ucx"] = "auto"  # auto: mapped memory to peers on this host
    require_transport: str | None = None
    tiers: TierConfig = field(default_factory=TierConfig)
    drain_timeout: float = 30.0  # seconds that a worker asked to leave takes to end its work


class WorkerProcess:
    """Everything in one worker. Raises ConfigError when it cannot be built."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._key = read_cluster_key(config.cluster_key_file) if config.cluster_key_file else None
        self._addresses = worker_addresses(
            config.routers[0], config.host, config.worker_id, config.control_port
        )
        if self._key is None and not is_local(config.routers[0]):
            raise ConfigError("links between hosts are encrypted: give --cluster-key-file")
        if self._key is None and not is_loopback(self._addresses.host):
            raise ConfigError(
                f"--host {self._addresses.host} is reachable from other hosts: give "
                "--cluster-key-file, so that workers can prove themselves to one another"
            )
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._leave = asyncio.Event()
        self._leave_now = asyncio.Event()
        self._engine = Engine.load(config.engine)
        host, rows = self._addresses.host, self._engine.rows
        auto = config.transport == "auto"
        factory = (
            auto_factory(rows, host, config.data_port, self._key)
            if auto
            else UCXTransport.factory(host, config.data_port, self._key)
        )
        layout = packed_layout(self._engine.fingerprint)
        self._transfer = TransferThread(rows, factory, self._on_transfer, layout=layout)
        self._transfer.start()
        if config.require_transport:
            check_transport(config.require_transport, self._transfer.description)
        metrics = CollectorRegistry()
        self._engine_thread = EngineThread(self._engine, metrics)
        self._pool = BlockPool(
            self._engine.num_blocks, self._engine.geometry.block_size, self._engine.salt
        )
        self._memory_ahead = None if rows.is_cuda else MemoryAhead(rows, self._pool)
        self._tiers = self._build_tiers(metrics)
        self._peers = Server(self._addresses.control, self._key)
        self._prefill_metrics = PrefillMetrics(metrics)
        self._roles = RoleRunner(
            config.role,
            self._build_role,
            in_step=lambda: self._engine_thread.running_for > 0,
            drain_timeout=config.drain_timeout,
            metrics=metrics,
        )
        row_bytes = self._engine.geometry.row_bytes
        metrics.register(WorkerCollector(self._roles, self._pool, row_bytes, self._transfer))
        readiness = Readiness(self._transfer, self._engine_thread)
        self._metrics_url = serve_status(host, config.metrics_port, metrics, readiness)
        identity = f"{config.worker_id}:{secrets.randbits(63)}"
        held = self._tiers.held if self._tiers is not None else self._pool
        self._links = [
            RouterLink(
                router,
                identity,
                self._key,
                self._registration,
                self._roles,
                on_drain=self._leave.set,
                feed=CacheFeed(held),
            )
            for router in config.routers
        ]

    async def run(self) -> None:
        """Serve until told to leave, or until a thread of this process fails.

        SIGINT, SIGTERM or a router's Drain: the worker takes no new work and ends when it has
        none left, at the latest after ``drain_timeout``; routers take what is left elsewhere. A
        second signal ends it at once.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal)
        leaving = asyncio.create_task(self._leave_when_told())
        tasks = [
            asyncio.create_task(self._roles.run(self._links)),
            *(asyncio.create_task(link.run()) for link in self._links),
        ]
        if self._tiers is not None:
            tasks.append(asyncio.create_task(self._tiers.run()))
        try:
            ends: list[asyncio.Future[Any]] = [*tasks, leaving, self._failed]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in (leaving, *tasks):
                task.cancel()
            await asyncio.gather(leaving, *tasks, return_exceptions=True)

    def _on_signal(self) -> None:
        (self._leave_now if self._leave.is_set() else self._leave).set()

    async def _leave_when_told(self) -> None:
        await self._leave.wait()
        log.info("leaving: no new work, at most %g s for the rest", self._config.drain_timeout)
        self._roles.leave()
        for link in self._links:
            link.leave()
        deadline = time.monotonic() + self._config.drain_timeout
        hurried = asyncio.create_task(self._leave_now.wait())
        while not (self._roles.idle or hurried.done() or time.monotonic() >= deadline):
            await asyncio.wait({hurried}, timeout=IDLE_POLL)
        hurried.cancel()

    def close(self) -> None:
        """End the threads and sockets."""
        self._engine_thread.close()
        self._transfer.stop()
        if self._memory_ahead is not None:
            self._memory_ahead.close()
        if self._tiers is not None:
            self._tiers.close()
        self._peers.close()

    def _build_tiers(self, metrics: CollectorRegistry) -> TieredCache | None:
        rows = self._engine.rows
        tiers = open_tiers(self._config.tiers, rows, self._engine.salt)
        if not tiers:
            return None
        row_bytes = self._engine.geometry.row_bytes
        cache = TieredCache(self._pool, BlockCopier(rows, tiers[0]), tiers, row_bytes)
        metrics.register(TierCollector(cache, tiers, row_bytes))
        return cache

    def _build_role(self, role: Role, epoch: int) -> PrefillWorker | DecodeWorker:
        limits = self._config.engine
        if role == "prefill":
            return PrefillWorker(
                self._engine_thread,
                self._transfer,
                PrefillScheduler(
                    self._pool,
                    max_num_batched_tokens=limits.max_num_batched_tokens,
                    max_num_seqs=limits.max_num_seqs,
                ),
                self._engine.fingerprint,
                identity=f"{self._config.worker_id}:{epoch}",
                cluster_key=self._key,
                send=self._send,
                metrics=self._prefill_metrics,
                tiers=self._tiers,
            )
        return DecodeWorker(
            self._engine_thread,
            self._transfer,
            DecodeScheduler(
                self._pool,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
            ),
            self._engine.fingerprint,
            epoch=epoch,
            vocab_size=self._engine.model_config.vocab_size,
            peers=self._peers,
            send=self._send,
            tiers=self._tiers,
        )

    def _send(self, router_id: str, message: Message) -> None:
        if isinstance(message, RequestFailed):
            extra = about(message.request_id, code=message.code)
            log.info("request %s failed here: %s", message.request_id, message.message, extra=extra)
        send_to(router_id, message, self._links)

    def _on_transfer(self, event: TransferEvent) -> None:
        """Called on the transfer thread."""
        try:
            self._loop.call_soon_threadsafe(self._take_transfer_event, event)
        except RuntimeError:  # the loop has ended, and the process with it
            log.debug("transfer event after the end: %s", event)

    def _take_transfer_event(self, event: TransferEvent) -> None:
        if not isinstance(event, Died):
            self._roles.current.from_transfer(event)
        elif not self._failed.done():
            self._failed.set_exception(KvferryError(f"the transfer thread died: {event.reason}"))

    def _registration(self, session: int) -> Register:
        return Register(
            worker_id=self._config.worker_id,
            epoch=self._roles.epoch,
            session=session,
            role=self._roles.role,
            model=self._config.engine.model,
            fingerprint=self._engine.fingerprint,
            vocab_size=self._engine.model_config.vocab_size,
            max_model_len=self._engine.max_model_len,
            pid=os.getpid(),
            host=socket.gethostname(),
            control=self._peers.endpoint,
            data=self._transfer.address,
            transport=self._transfer.description,
            metrics=self._metrics_url,
            load=self._roles.load(),
        )


async def serve_worker(config: WorkerConfig) -> None:
    """Run one worker to its end. Raises ConfigError when it cannot start."""
    worker = WorkerProcess(config)
    try:
        await worker.run()
    finally:
        worker.close()
