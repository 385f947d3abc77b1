"""A simulated prefill worker: the real scheduler, hand-offs and block pool."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import assert_never

from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from kvtransfer.events import BlocksSent, SendFailed, TransferEvent
from kvtransfer.inproc import InProcessNetwork
from prefill import handoff_events as hand
from prefill.handoff import Handoffs
from prefill.scheduler import PrefillScheduler
from protocol.messages import FirstToken, Message, PeerAddress, RequestFailed
from tests.fake_model import Memory
from tests.handoff_simulation.data_plane import DataPlane
from tests.handoff_simulation.network import Network
from tests.handoff_simulation.setup import DECODE, GEOMETRY, Request, Setup


class SimulatedPrefill:
    """``to_decode`` and ``to_router`` are what its messages do when they arrive."""

    def __init__(
        self,
        setup: Setup,
        network: Network,
        ends: InProcessNetwork,
        to_decode: Callable[[Message], None],
        to_router: Callable[[FirstToken | RequestFailed], None],
    ) -> None:
        self._network = network
        self._to_decode = to_decode
        self._to_router = to_router
        self.pool = BlockPool(setup.prefill_blocks, GEOMETRY.block_size)
        self.memory = Memory(setup.prefill_blocks, GEOMETRY.block_size)
        self.scheduler = PrefillScheduler(
            self.pool,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_num_seqs=setup.max_num_seqs,
            ask_ahead=setup.ask_ahead,
        )
        self.handoffs = Handoffs(self.pool, setup.prefill_fingerprint)
        self.plane = DataPlane(
            network,
            ends,
            b"inproc-prefill",
            self.memory,
            setup.transfer,
            self._from_transfer,
            in_use=self.scheduler.owned_blocks,
        )
        self._step: tuple[Batch, list[int] | None] | None = None

    def start(self, attempt_id: str, request: Request, token_ids: list[int]) -> None:
        """The router's PrefillRequest arrives."""
        peer = PeerAddress(worker_id=DECODE, epoch=request.epoch, control="", data=b"inproc-decode")
        sequence = Sequence(attempt_id, token_ids, len(request.prompt), request.sampling)
        self.scheduler.add(sequence)
        self.handle(hand.Queued(sequence, "router", peer, request.deadline))

    def handle(self, event: hand.Event) -> None:
        """Give the hand-offs an event and carry out what they want."""
        for action in self.handoffs.handle(event, self._network.now):
            match action:
                case hand.Tell(_, message):
                    self._network.post("prefill>decode", partial(self._to_decode, message))
                case hand.Ship(peer, grant_id, first, source, destination):
                    self.plane.send_blocks(peer.data, grant_id, first, source, destination)
                case hand.Allow(request_id):
                    self.scheduler.grant(request_id)
                case hand.Abandon(request_id):
                    self.scheduler.cancel(request_id)
                case hand.Report(_, failed):
                    self._network.post("prefill>router", partial(self._to_router, failed))
                case _:
                    assert_never(action)

    def hear(self, message: Message, worker_id: str = DECODE) -> None:
        """A decode worker's message arrives."""
        self.handle(hand.FromPeer(worker_id, message))  # type: ignore[arg-type]

    def events(self) -> list[Callable[[], None]]:
        """What can happen next."""
        return [self._commit if self._step else self._schedule, *self.plane.events()]

    def tick(self) -> None:
        """Time has passed."""
        self.handle(hand.Tick())
        self.plane.nap_ends()

    def drop_router(self) -> None:
        """Take the router for lost."""
        self.handle(hand.RouterLost("router"))

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        return not (
            self._step
            or self.scheduler.waiting
            or self.scheduler.running
            or self.handoffs.num_open
            or self.pool.num_used
            or not self.plane.quiet
        )

    def check(self) -> None:
        """Every block reference has exactly one owner; no block is free while it is read."""
        owned = [*self.scheduler.owned_blocks(), *self.handoffs.owned_blocks()]
        self.pool.check_integrity(owned)
        assert self.plane.reading().issubset(itertools.chain(*owned))

    def _from_transfer(self, event: TransferEvent) -> None:
        match event:
            case BlocksSent(grant_id, first, digests):
                self.handle(hand.Shipped(grant_id, first, digests))
            case SendFailed(grant_id, first, reason):
                self.handle(hand.ShipFailed(grant_id, first, reason))
            case _:
                raise AssertionError(f"{event} on the sending side")

    def _schedule(self) -> None:
        """Begin a step; the engine writes now or only when the step ends."""
        batch = self.scheduler.schedule()
        if batch.rows:
            early = self._network.random.random() < 0.5
            self._step = batch, self.memory.run(batch) if early else None
        for sequence in list(self.scheduler.prompts_to_offer()):
            self.handle(hand.Ask(sequence.request_id))

    def _commit(self) -> None:
        """End the running step."""
        assert self._step is not None
        batch, token_ids = self._step
        self._step = None
        if token_ids is None:
            token_ids = self.memory.run(batch)
        for sequence, token_id in self.scheduler.commit(token_ids):
            assert self.handoffs.lease(sequence.request_id) is not None
            if token_id is not None:
                first = FirstToken(
                    request_id=sequence.request_id,
                    index=sequence.num_output_tokens - 1,
                    token_id=token_id,
                    finish_reason=sequence.finish_reason(),
                    num_cached_tokens=sequence.num_cached,
                )
                self._network.post("prefill>router", partial(self._to_router, first))
            self.handle(hand.Computed(sequence.request_id, finished=token_id is not None))
