"""A simulated decode worker: the real admission, scheduler and block pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import assert_never

from decode import admission_events as adm
from decode.admission import Admission
from decode.residents import Resident, Residents
from decode.scheduler import DecodeScheduler
from engine.batch import Batch
from engine.block_pool import BlockPool
from kvtransfer.events import (
    BlocksReceived,
    GrantClosed,
    MessageRefused,
    ReceiveFailed,
    TransferEvent,
)
from kvtransfer.inproc import InProcessNetwork
from protocol.errors import DeadlineError
from protocol.messages import (
    Accepted,
    FirstToken,
    GenerateRequest,
    Message,
    RequestFailed,
    TokenUpdate,
)
from tests.fake_model import VOCAB, Memory
from tests.handoff_simulation.data_plane import DataPlane
from tests.handoff_simulation.network import Network
from tests.handoff_simulation.setup import EPOCH, FINGERPRINT, GEOMETRY, Request, Setup
from tests.handoff_simulation.tier import SimulatedTier

PEER = b"prefill"  # the identity of the prefill worker's link


class SimulatedDecode:
    """``to_prefill`` and ``to_router`` are what its messages do when they arrive."""

    def __init__(
        self,
        setup: Setup,
        network: Network,
        ends: InProcessNetwork,
        to_prefill: Callable[[Message], None],
        to_router: Callable[[FirstToken | TokenUpdate | RequestFailed], None],
    ) -> None:
        self._network = network
        self._to_prefill = to_prefill
        self._to_router = to_router
        self.pool = BlockPool(setup.decode_blocks, GEOMETRY.block_size)
        self.memory = Memory(setup.decode_blocks, GEOMETRY.block_size)
        self.scheduler = DecodeScheduler(
            self.pool,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
        )
        self.admission = Admission(
            self.pool,
            FINGERPRINT,
            EPOCH,
            vocab_size=VOCAB,
            headroom=lambda: self.scheduler.headroom,
            grant_timeout=20.0,
            new_grant_id=count(1).__next__,
        )
        self.tier = SimulatedTier(
            setup.tier_blocks,
            self.pool,
            self.memory,
            network,
            self.handle,
            in_use=self.scheduler.owned_blocks,
        )
        self.admission.room.loadable = self.tier.loadable
        self.residents = Residents()
        self.grants: dict[int, list[int]] = {}  # not closed yet: id to blocks
        self.plane = DataPlane(
            network,
            ends,
            b"inproc-decode",
            self.memory,
            setup.transfer,
            self._from_transfer,
            in_use=self.scheduler.owned_blocks,
        )
        self._step: tuple[Batch, list[int] | None] | None = None

    def handle(self, event: adm.Event) -> None:
        """Give the admission an event and carry out what it wants."""
        for action in self.admission.handle(event, self._network.now):
            match action:
                case adm.Reply(_, message):
                    self._network.post("decode>prefill", partial(self._to_prefill, message))
                    if isinstance(message, Accepted) and self._network.random.random() < 0.2:
                        self._network.post("decode>prefill", partial(self._to_prefill, message))
                case adm.OpenReceive(grant_id, blocks, _):
                    self.grants[grant_id] = blocks
                    self.plane.open_grant(grant_id, blocks)
                case adm.LoadBlocks():
                    self.tier.load(action)
                case adm.CloseReceive(grant_id):
                    self.plane.close_grant(grant_id)
                case adm.Admit(sequence, router_id, deadline, waited):
                    resident = Resident(router_id, deadline, self._network.now, waited)
                    self.residents.add(sequence.request_id, resident)
                    self.scheduler.add(sequence)
                case adm.Abandon(request_id):
                    self._drop(request_id)
                case adm.Report(_, failed):
                    self._network.post("decode>router", partial(self._to_router, failed))
                case _:
                    assert_never(action)

    def start(self, attempt_id: str, request: Request, token_ids: list[int]) -> None:
        """The router's GenerateRequest arrives."""
        asked = GenerateRequest(
            request_id=attempt_id,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            timeout=request.deadline - self._network.now,
        )
        self.handle(adm.Asked("router", asked))

    def hear(self, message: Message, peer: bytes = PEER) -> None:
        """A prefill worker's message arrives."""
        self.handle(adm.FromPeer(peer, message))  # type: ignore[arg-type]

    def events(self) -> list[Callable[[], None]]:
        """What can happen next."""
        step = self._commit if self._step else self._schedule
        return [step, *self.plane.events(), *self.tier.events()]

    def tick(self) -> None:
        """Time has passed."""
        self.handle(adm.Tick())
        self.plane.nap_ends()
        for request_id in self.residents.expired(self._network.now):
            self._drop(request_id)
            failed = RequestFailed(request_id=request_id, code=DeadlineError.code, message="late")
            self._network.post("decode>router", partial(self._to_router, failed))

    def drop_router(self) -> None:
        """Take the router for lost."""
        for request_id in self.residents.of_router("router"):
            self._drop(request_id)
        self.handle(adm.RouterLost("router"))

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        return not (
            self._step
            or self.scheduler.num_waiting
            or self.scheduler.running
            or len(self.residents)
            or self.admission.grants.num_open
            or self.pool.num_used
            or not self.plane.quiet
            or not self.tier.quiet
        )

    def check(self) -> None:
        """Every block reference has exactly one owner."""
        owned = [*self.scheduler.owned_blocks(), *self.admission.grants.owned_blocks()]
        self.pool.check_integrity([*owned, *self.tier.owned_blocks()])

    def _from_transfer(self, event: TransferEvent) -> None:
        match event:
            case BlocksReceived(grant_id, first, digests):
                self.handle(adm.Received(grant_id, first, digests))
            case ReceiveFailed(grant_id, reason):
                self.handle(adm.ReceiveFailed(grant_id, reason))
            case GrantClosed(grant_id):
                del self.grants[grant_id]
                self.handle(adm.Closed(grant_id))
            case MessageRefused():
                pass  # counted by the transfer
            case _:
                raise AssertionError(f"{event} on the receiving side")

    def _drop(self, request_id: str) -> None:
        self.residents.remove(request_id)
        self.scheduler.cancel(request_id)

    def _schedule(self) -> None:
        """Begin a step; the engine writes now or only when the step ends."""
        batch = self.scheduler.schedule()
        if batch.rows:
            early = self._network.random.random() < 0.5
            self._step = batch, self.memory.run(batch) if early else None

    def _commit(self) -> None:
        """End the running step."""
        assert self._step is not None
        batch, token_ids = self._step
        self._step = None
        for new in self.scheduler.commit(token_ids or self.memory.run(batch)):
            name, index = new.sequence.request_id, new.sequence.num_output_tokens - 1
            resident = self.residents.get(name)
            told: FirstToken | TokenUpdate = TokenUpdate(
                request_id=name,
                index=index,
                token_ids=[new.token_id],
                finish_reason=new.finish_reason,
            )
            if resident.awaits_first_token:
                told = FirstToken(
                    request_id=name,
                    index=index,
                    token_id=new.token_id,
                    finish_reason=new.finish_reason,
                    num_cached_tokens=new.sequence.num_cached,
                )
            resident.account(self._network.now)
            if new.finish_reason is not None:
                self.residents.remove(name)
            self._network.post("decode>router", partial(self._to_router, told))
        self.handle(adm.Tick())
