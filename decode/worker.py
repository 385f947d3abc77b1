"""The decode role around an engine: grant, receive, verify, batch token generation.

Prompts that a router sends here, and not through prefill, are computed between the tokens.

All state lives on the event loop; the engine's and the transfer's threads only execute. Only the
links and the transfer are touched here: every decision is the scheduler's or the admission's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import assert_never

from prometheus_client.core import Metric

from decode import admission_events as adm
from decode.admission import Admission
from decode.metrics import metrics
from decode.news import first_token, update
from decode.prompt_rate import PromptRate
from decode.residents import Resident, Residents
from decode.scheduler import DecodeScheduler, NewToken
from engine.batch import Batch, StepOutput
from engine.block_pool import BlockPool
from engine.thread import EngineThread
from engine.tiers.cache import TieredCache
from kvtransfer import events
from kvtransfer.thread import TransferThread
from protocol.errors import DeadlineError, InvalidRequestError
from protocol.geometry import Fingerprint
from protocol.link import Server
from protocol.logs import about
from protocol.messages import (
    Cancel,
    GenerateRequest,
    GrantRequest,
    Handoff,
    Message,
    RequestFailed,
    Revoke,
    Tokens,
    TokenUpdate,
    WorkerLoad,
)

log = logging.getLogger(__name__)

TICK = 0.2  # seconds


class DecodeWorker:
    """Continues sequences. ``send(router_id, message)`` reaches a router."""

    def __init__(
        self,
        engine: EngineThread,
        transfer: TransferThread,
        scheduler: DecodeScheduler,
        fingerprint: Fingerprint,
        *,
        epoch: int,
        vocab_size: int,
        peers: Server,
        send: Callable[[str, Message], None],
        tiers: TieredCache | None = None,
    ) -> None:
        self._engine = engine
        self._transfer = transfer
        self._scheduler = scheduler
        self._pool: BlockPool = scheduler.pool
        self._admission = Admission(
            scheduler.pool,
            fingerprint,
            epoch,
            vocab_size=vocab_size,
            headroom=lambda: scheduler.headroom,
        )
        self._peers = peers
        self._send = send
        self._wake = asyncio.Event()
        self._residents = Residents()
        self._rate = PromptRate()
        self._tiers = tiers
        if tiers is not None:
            room = self._admission.room
            room.may_start = lambda prompt, headroom: tiers.ready(
                prompt, self._rate.tokens_per_second, headroom
            )
            room.loadable = tiers.loadable
            tiers.on_change = lambda: self._handle(adm.Tick())

    def load(self) -> WorkerLoad:
        """What the router is told."""
        return WorkerLoad(
            max_num_seqs=self._scheduler.max_num_seqs,
            max_num_batched_tokens=self._scheduler.max_num_batched_tokens,
            num_promised=self._admission.grants.num_requests + len(self._residents),
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            waiting_tokens=self._admission.grants.pending_tokens + self._scheduler.waiting_tokens,
            prefill_tokens_per_second=self._rate.tokens_per_second,
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            open_grants=self._admission.grants.num_open,
            prefill_steps=self._engine.steps.prefill,
            decode_steps=self._engine.steps.decode,
        )

    def metrics(self) -> Iterator[Metric]:
        """What only this role counts."""
        return metrics(self._scheduler, self._admission)

    @property
    def idle(self) -> bool:
        """Whether no grant is open and no sequence is left."""
        return self._admission.grants.num_open == 0 and len(self._residents) == 0

    def leave(self) -> None:
        """Take nothing new; what has come goes on."""
        self._admission.grants.leaving = True

    def drop_router(self, router_id: str) -> None:
        """Drop everything that a router asked for: it is gone, or has given this worker up."""
        for request_id in self._residents.of_router(router_id):
            self._drop(request_id)
        self._handle(adm.RouterLost(router_id))

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._steps())
            tasks.create_task(self._ticks())
            tasks.create_task(self._receive_from_peers())

    def from_router(self, router_id: str, message: Message) -> None:
        """Take a router's message."""
        match message:
            case GenerateRequest() if message.request_id in self._residents:
                log.warning(
                    "request %s came twice, the second is ignored",
                    message.request_id,
                    extra=about(message.request_id),
                )
            case GenerateRequest():
                self._engine.expect(message.sampling)
                self._handle(adm.Asked(router_id, message))
            case Cancel():
                self._handle(adm.Cancelled(message.request_id))
            case _:
                log.warning("unexpected %s from router %s", type(message).__name__, router_id)

    def from_transfer(self, event: events.TransferEvent) -> None:
        """Take an event of the transfer thread, on the event loop."""
        match event:
            case events.BlocksReceived():
                self._handle(adm.Received(event.grant_id, event.first, event.digests))
            case events.ReceiveFailed():
                self._handle(adm.ReceiveFailed(event.grant_id, event.reason))
            case events.GrantClosed():
                self._handle(adm.Closed(event.grant_id))
            case events.MessageRefused():
                log.debug("refused by the transfer: %s", event)  # which counts them
            case _:
                log.warning("unexpected %s from the transfer", type(event).__name__)

    async def _steps(self) -> None:
        news: list[NewToken] = []
        output = StepOutput([])  # of the last step
        while True:
            self._wake.clear()
            batch = self._scheduler.schedule()
            began = time.monotonic()
            step = self._engine.run(batch) if batch.rows else None
            if news:  # told while the engine computes the next step
                self._publish(news, output)
                self._handle(adm.Tick())  # finished sequences made room for grants
            if step is not None:
                output = await step
                self._note(batch, output, time.monotonic() - began)
                news = self._scheduler.commit(output.token_ids)
            else:
                news = []
                await self._wake.wait()

    def _note(self, batch: Batch, output: StepOutput, seconds: float) -> None:
        """Take what a step gave beside its tokens."""
        num_generating = sum(row.num_tokens == 1 for row in batch.rows)
        self._rate.step(batch.num_tokens - num_generating, num_generating, seconds)
        for row in batch.rows if output.prompt_logprobs else ():
            told = output.prompt_logprobs.get(row.sequence.request_id, [])
            row.sequence.prompt_logprobs += told
        for request_id, reason in output.failures.items():
            self._give_up(request_id, InvalidRequestError.code, reason)

    def _publish(self, news: list[NewToken], output: StepOutput) -> None:
        by_router: defaultdict[str, list[TokenUpdate]] = defaultdict(list)
        now = time.monotonic()
        for new in news:
            request_id = new.sequence.request_id
            resident = self._residents.get(request_id)
            logprobs, is_first = output.logprobs.get(request_id), resident.awaits_first_token
            account = resident.account(now)
            if is_first:
                self._send(resident.router_id, first_token(new, logprobs, account))
            else:
                by_router[resident.router_id].append(update(new, logprobs, account))
            if new.finish_reason is not None:
                self._residents.remove(request_id)
        for router_id, updates in by_router.items():
            self._send(router_id, Tokens(updates=updates))

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._expire(time.monotonic())
            self._handle(adm.Tick())

    def _expire(self, now: float) -> None:
        for request_id in self._residents.expired(now):
            message = "the request's deadline passed while it generated"
            self._give_up(request_id, DeadlineError.code, message)

    def _give_up(self, request_id: str, code: str, message: str) -> None:
        """Fail a request, unless it is over."""
        if request_id in self._residents:
            failed = RequestFailed(request_id=request_id, code=code, message=message)
            self._send(self._residents.get(request_id).router_id, failed)
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._residents.remove(request_id)
        self._scheduler.cancel(request_id)

    async def _receive_from_peers(self) -> None:
        while True:
            peer, message = await self._peers.receive()
            if isinstance(message, GrantRequest | Handoff | Revoke):
                if isinstance(message, GrantRequest):
                    self._engine.expect(message.sampling)
                self._handle(adm.FromPeer(peer, message))
            else:
                log.warning("unexpected %s from prefill", type(message).__name__)

    def _handle(self, event: adm.Event) -> None:
        for action in self._admission.handle(event, time.monotonic()):
            self._do(action)
        self._wake.set()  # a sequence may have come, or room for a preempted one

    def _do(self, action: adm.Action) -> None:
        match action:
            case adm.Reply():
                self._peers.send(action.peer, action.message)
            case adm.OpenReceive():
                self._transfer.open_grant(action.grant_id, action.blocks, action.sender)
            case adm.LoadBlocks():
                self._load(action)
            case adm.CloseReceive():
                self._transfer.close_grant(action.grant_id)
            case adm.Admit():
                now = time.monotonic()
                resident = Resident(action.router_id, action.deadline, now, action.waited)
                self._residents.add(action.sequence.request_id, resident)
                self._scheduler.add(action.sequence)
            case adm.Abandon():
                self._drop(action.request_id)
            case adm.Report():
                self._send(action.router_id, action.message)
            case _:
                assert_never(action)

    def _load(self, action: adm.LoadBlocks) -> None:
        assert self._tiers is not None, "no block of a grant was to come from a tier"
        self._tiers.load(
            action.sequence,
            action.count,
            lambda num_blocks: self._handle(adm.Loaded(action.grant_id, num_blocks)),
        )
