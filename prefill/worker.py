"""The prefill role around an engine: queue, compute in chunks, ship, hand off.

All state lives on the event loop; the engine's and the transfer's threads only execute. Only the
links and the transfer are touched here: every decision is the scheduler's or the hand-off's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import assert_never

from prometheus_client.core import CounterMetricFamily, Metric

from engine.batch import StepOutput
from engine.block_pool import BlockPool
from engine.rate import Rate
from engine.sequence import Sequence
from engine.thread import EngineThread
from engine.tiers.cache import TieredCache
from kvtransfer.events import BlocksSent, SendFailed, TransferEvent
from kvtransfer.thread import TransferThread
from prefill.handoff import Handoffs
from prefill.handoff_events import (
    Abandon,
    Action,
    Allow,
    Ask,
    Cancelled,
    Computed,
    Event,
    FromPeer,
    Queued,
    Report,
    RouterLost,
    Ship,
    ShipFailed,
    Shipped,
    Tell,
    Tick,
)
from prefill.metrics import PrefillMetrics
from prefill.peers import DecodePeers
from prefill.scheduler import PrefillScheduler
from protocol.errors import InvalidRequestError, UnavailableError
from protocol.geometry import Fingerprint
from protocol.logs import about
from protocol.messages import (
    Cancel,
    FirstToken,
    Message,
    PrefillRequest,
    RequestFailed,
    WorkerLoad,
)

log = logging.getLogger(__name__)

TICK = 0.2  # seconds


class PrefillWorker:
    """Serves prompts. ``send(router_id, message)`` reaches a router."""

    def __init__(
        self,
        engine: EngineThread,
        transfer: TransferThread,
        scheduler: PrefillScheduler,
        fingerprint: Fingerprint,
        *,
        identity: str,
        cluster_key: bytes | None,
        send: Callable[[str, Message], None],
        metrics: PrefillMetrics,
        tiers: TieredCache | None = None,
    ) -> None:
        self._engine = engine
        self._transfer = transfer
        self._scheduler = scheduler
        self._pool: BlockPool = scheduler.pool
        self._handoffs = Handoffs(scheduler.pool, fingerprint)
        self._send = send
        self._metrics = metrics
        self._rate = Rate()
        self._leaving = False
        self._wake = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._peers = DecodePeers(
            identity,
            cluster_key,
            self._tasks,
            lambda worker_id, answer: self._handle(FromPeer(worker_id, answer)),
        )
        if tiers is not None:
            scheduler.may_start = lambda prompt: tiers.ready(prompt, self._rate.per_second)
            tiers.on_change = self._wake.set

    def load(self) -> WorkerLoad:
        """What the router is told."""
        return WorkerLoad(
            max_num_seqs=self._scheduler.max_num_seqs,
            max_num_batched_tokens=self._scheduler.max_num_batched_tokens,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            waiting_tokens=self._scheduler.waiting_tokens,
            prefill_tokens_per_second=self._rate.per_second,
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            open_leases=self._handoffs.num_open,
            prefill_steps=self._engine.steps.prefill,
            decode_steps=self._engine.steps.decode,
        )

    def metrics(self) -> Iterator[Metric]:
        """What only this role counts."""
        expired = self._handoffs.num_expired
        yield CounterMetricFamily(
            "kvferry_kv_leases_expired", "Hand-offs that ran into their deadline", value=expired
        )
        yield CounterMetricFamily(
            "kvferry_stale_messages",
            "Answers of decode workers about hand-offs that are over",
            value=self._handoffs.num_stale,
        )

    @property
    def idle(self) -> bool:
        """Whether no prompt, lease or transfer is left."""
        return self._handoffs.num_open == 0

    def leave(self) -> None:
        """Take no new prompts; those that are here go on."""
        self._leaving = True

    def drop_router(self, router_id: str) -> None:
        """Drop everything that a router asked for: it is gone, or has given this worker up."""
        self._handle(RouterLost(router_id))

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with self._tasks:
                self._tasks.create_task(self._steps())
                self._tasks.create_task(self._ticks())
        finally:
            self._peers.close()

    def from_router(self, router_id: str, message: Message) -> None:
        """Take a router's message."""
        match message:
            case PrefillRequest() if self._handoffs.lease(message.request_id) is not None:
                log.warning(
                    "request %s came twice, the second is ignored",
                    message.request_id,
                    extra=about(message.request_id),
                )
            case PrefillRequest() if self._leaving:
                refusal = RequestFailed(
                    request_id=message.request_id,
                    code=UnavailableError.code,
                    message="this prefill worker is leaving",
                )
                self._send(router_id, refusal)
            case PrefillRequest():
                self._queue(router_id, message)
            case Cancel():
                self._handle(Cancelled(message.request_id))
            case _:
                log.warning("unexpected %s from router", type(message).__name__)

    def _queue(self, router_id: str, message: PrefillRequest) -> None:
        sequence = Sequence.of(message)
        sequence.recomputed = sequence.num_output_tokens > 0
        self._engine.expect(message.sampling)
        self._metrics.arrived(message.request_id)
        self._scheduler.add(sequence)
        deadline = time.monotonic() + message.timeout
        self._handle(Queued(sequence, router_id, message.decode, deadline))

    def from_transfer(self, event: TransferEvent) -> None:
        """Take an event of the transfer thread, on the event loop."""
        match event:
            case BlocksSent():
                self._metrics.shipped(event.grant_id, event.first)
                self._handle(Shipped(event.grant_id, event.first, event.digests))
            case SendFailed():
                self._metrics.shipped(event.grant_id, event.first)
                self._handle(ShipFailed(event.grant_id, event.first, event.reason))
            case _:
                log.warning("unexpected %s from the transfer", type(event).__name__)

    async def _steps(self) -> None:
        while True:
            batch = self._scheduler.schedule()
            began = time.monotonic()
            step = self._engine.run(batch) if batch.rows else None
            for row in batch.rows:
                self._metrics.started(row.sequence.request_id)
            for sequence in list(self._scheduler.prompts_to_offer()):  # while the engine computes
                self._metrics.asked(sequence.request_id)
                self._handle(Ask(sequence.request_id))
            if step is not None:
                output = await step
                self._rate.add(batch.num_tokens, time.monotonic() - began)
                self._commit(output)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _commit(self, output: StepOutput) -> None:
        for request_id, failure in output.failures.items():
            self._refuse(request_id, failure)
        for sequence, token_id in self._scheduler.commit(output.token_ids):
            request_id = sequence.request_id
            lease = self._handoffs.lease(request_id)
            assert lease is not None, f"{request_id} was computed without a lease"
            sequence.prompt_logprobs += output.prompt_logprobs.get(request_id, [])
            if token_id is not None:
                reason = sequence.finish_reason()
                first = FirstToken(
                    request_id=request_id,
                    index=sequence.num_output_tokens - 1,
                    token_id=token_id,
                    finish_reason=reason,
                    num_cached_tokens=sequence.num_cached,
                    logprobs=output.logprobs.get(request_id),
                    prompt_logprobs=sequence.all_prompt_logprobs(),
                    account=self._metrics.first_token(request_id),
                )
                self._send(lease.router_id, first)
            self._handle(Computed(request_id, finished=token_id is not None))

    def _refuse(self, request_id: str, reason: str) -> None:
        """Give up a request that the engine finds wrong, unless it is over."""
        lease = self._handoffs.lease(request_id)
        if lease is not None:
            code = InvalidRequestError.code
            failed = RequestFailed(request_id=request_id, code=code, message=reason)
            self._send(lease.router_id, failed)
            self._handle(Cancelled(request_id))

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._handle(Tick())

    def _handle(self, event: Event) -> None:
        for action in self._handoffs.handle(event, time.monotonic()):
            self._do(action)
        self._wake.set()

    def _do(self, action: Action) -> None:
        match action:
            case Tell():
                self._peers.send(action.peer, action.message)
            case Ship():
                self._metrics.shipping(action.grant_id, action.first)
                self._transfer.send_blocks(
                    action.peer.data,
                    action.grant_id,
                    action.first,
                    action.source,
                    action.destination,
                )
            case Allow():
                self._metrics.granted(action.request_id)
                self._scheduler.grant(action.request_id)
            case Abandon():
                self._metrics.abandoned(action.request_id)
                self._scheduler.cancel(action.request_id)
            case Report():
                self._send(action.router_id, action.message)
            case _:
                assert_never(action)
