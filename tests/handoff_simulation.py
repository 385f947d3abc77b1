"""One router, one prefill and one decode worker without I/O, joined by a scripted network.

An attempt that fails is followed by another on the same two workers.

The schedulers, both hand-off state machines, the block pools and the router's lifecycle are the
real ones. A seed decides the order of everything that could happen in any order: messages are
FIFO within a channel and nothing more, a transfer copies its blocks at any moment before it is
done, the engine writes at any moment of its step, faults and cancels come at any time. After
every event both pools are audited, and every copy is checked against the blocks' owners.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random

from decode import admission as adm
from decode.admission import Admission
from decode.residents import Resident, Residents
from decode.scheduler import DecodeScheduler
from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill import handoff as hand
from prefill.handoff import Handoffs
from prefill.scheduler import PrefillScheduler
from protocol.errors import DeadlineError, KvferryError, error_from_code
from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import (
    Accepted,
    FirstToken,
    Message,
    PeerAddress,
    RequestFailed,
    Revoke,
    TokenUpdate,
)
from protocol.sampling import SamplingParams
from router.lifecycle import RequestLifecycle, RequestState
from router.lifecycle_events import (
    AttemptFailed,
    CancelOn,
    ClientGone,
    Deliver,
    Fail,
    Placed,
    Retry,
    WorkerLost,
)
from router.lifecycle_events import Event as RouterEvent
from tests.fake_model import Memory

PREFILL, DECODE = "prefill-0", "decode-0"
EPOCH = 7
GEOMETRY = KVGeometry(num_kv_heads=1, num_layers=1, block_size=4, head_dim=4, dtype="float32")
FINGERPRINT = Fingerprint(weights_digest="00", rope="none", geometry=GEOMETRY)


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes of the two workers. Blocks hold ``GEOMETRY.block_size`` tokens."""

    prefill_blocks: int = 32
    decode_blocks: int = 32
    max_num_batched_tokens: int = 8
    max_num_seqs: int = 4
    ask_ahead: int = 8
    prefill_fingerprint: Fingerprint = FINGERPRINT


@dataclass(slots=True, eq=False)
class Shipment:
    """A transfer under way. ``expected`` is what its source held when it was started."""

    order: hand.Ship
    expected: list[list[int]]
    digests: list[int] = field(default_factory=list)  # known once copied
    copied: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One request as its client sees it."""

    prompt: list[int]
    sampling: SamplingParams
    lifecycle: RequestLifecycle
    deadline: float
    epoch: int  # of the decode worker, as the router knows it
    tokens: list[int] = field(default_factory=list)
    errors: list[KvferryError] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    num_attempts: int = 0


class Simulation:
    """``events()`` names what can happen now; each is a callable that makes it happen."""

    def __init__(self, setup: Setup, random: Random) -> None:
        block_size = GEOMETRY.block_size
        self.random = random
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.attempts: dict[str, Request] = {}  # every one there ever was
        self.channels: dict[str, deque[Callable[[], None]]] = {}
        self.shipments: list[Shipment] = []
        self.receives: dict[int, list[int]] = {}  # grant id to blocks that may be written
        self.corrupt = False  # whether the next copy arrives damaged
        self.lost = False  # whether a message between the workers was lost

        pool = BlockPool(setup.prefill_blocks, block_size)
        self.prefill_memory = Memory(setup.prefill_blocks, block_size)
        self.prefill = PrefillScheduler(
            pool,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_num_seqs=setup.max_num_seqs,
            ask_ahead=setup.ask_ahead,
        )
        self.handoffs = Handoffs(pool, setup.prefill_fingerprint)
        self.prefill_step: tuple[Batch, list[int] | None] | None = None

        pool = BlockPool(setup.decode_blocks, block_size)
        self.decode_memory = Memory(setup.decode_blocks, block_size)
        self.decode = DecodeScheduler(
            pool,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
        )
        self.admission = Admission(
            pool,
            FINGERPRINT,
            EPOCH,
            headroom=lambda: self.decode.headroom,
            grant_timeout=20.0,
            new_grant_id=count(1).__next__,
        )
        self.residents = Residents()
        self.decode_step: tuple[Batch, list[int] | None] | None = None

    # The client and the router ---------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        timeout: float = 1e9,
        epoch: int = EPOCH,
        max_retries: int = 0,
    ) -> Request:
        """A client sends a request."""
        request_id = f"r{len(self.requests)}"
        lifecycle = RequestLifecycle(request_id, max_retries)
        request = Request(prompt, sampling, lifecycle, self.now + timeout, epoch)
        self.requests[request_id] = request
        self._place(request)
        return request

    def _place(self, request: Request) -> None:
        lifecycle = request.lifecycle
        if lifecycle.state is not RequestState.WAITING:
            return
        lifecycle.handle(Placed(PREFILL, DECODE))
        request.num_attempts += 1
        attempt_id = lifecycle.attempt_id
        self.attempts[attempt_id] = request
        token_ids = [*request.prompt, *lifecycle.token_ids]
        self._post("router>prefill", lambda: self._start(attempt_id, token_ids))

    def cancel(self, request: Request) -> None:
        """The client goes away."""
        request.cancelled |= request.lifecycle.state is not RequestState.ENDED
        self._to_lifecycle(request, ClientGone())

    def _from_worker(self, worker_id: str, event: FirstToken | TokenUpdate | RequestFailed) -> None:
        request = self.attempts[event.request_id]
        at_work = request.lifecycle.state in (RequestState.PREFILLING, RequestState.DECODING)
        stale = not at_work or event.request_id != request.lifecycle.attempt_id
        if isinstance(event, RequestFailed):
            error = error_from_code(event.code, event.message)
            if not stale:
                self._to_lifecycle(request, AttemptFailed(worker_id, error))
        elif stale:
            self._cancel_on(worker_id, event.request_id)
        else:
            self._to_lifecycle(request, event)

    def _to_lifecycle(self, request: Request, event: RouterEvent) -> None:
        for action in request.lifecycle.handle(event):
            match action:
                case Deliver(chunk):
                    request.tokens += chunk.token_ids
                    assert request.finish_reason is None
                    request.finish_reason = chunk.finish_reason
                case Fail(error):
                    request.errors.append(error)
                case CancelOn(worker_id, attempt_id):
                    self._cancel_on(worker_id, attempt_id)
                case Retry():
                    self._post("router", lambda: self._place(request))

    def _cancel_on(self, worker_id: str, request_id: str) -> None:
        if worker_id == PREFILL:
            self._post("router>prefill", lambda: self.to_prefill(hand.Cancelled(request_id)))
        else:
            self._post("router>decode", lambda: self.to_decode(adm.Cancelled(request_id)))

    # Prefill ---------------------------------------------------------------------------------

    def _start(self, attempt_id: str, token_ids: list[int]) -> None:
        request = self.attempts[attempt_id]
        peer = PeerAddress(worker_id=DECODE, epoch=request.epoch, control="", data=b"")
        sequence = Sequence(attempt_id, token_ids, len(request.prompt), request.sampling)
        self.prefill.add(sequence)
        self.to_prefill(hand.Queued(sequence, "router", peer, request.deadline))

    def to_prefill(self, event: hand.Event) -> None:
        """Give the prefill worker an event and carry out what it wants."""
        for action in self.handoffs.handle(event, self.now):
            match action:
                case hand.Tell(_, message):
                    self._post("prefill>decode", partial(self._decode_hears, message))
                case hand.Ship():
                    rows = self.prefill_memory.rows
                    held = [list(rows[block]) for block in action.source]
                    self.shipments.append(Shipment(action, held))
                case hand.Allow(request_id):
                    self.prefill.grant(request_id)
                case hand.Abandon(request_id):
                    self.prefill.cancel(request_id)
                case hand.Report(_, failed):
                    self._post("prefill>router", partial(self._from_worker, PREFILL, failed))

    def prefill_schedule(self) -> None:
        """Begin a step; the engine writes now or only when the step ends."""
        for sequence in list(self.prefill.prompts_to_offer()):
            self.to_prefill(hand.Ask(sequence.request_id))
        batch = self.prefill.schedule()
        if batch.rows:
            early = self.random.random() < 0.5
            self.prefill_step = batch, self.prefill_memory.run(batch) if early else None

    def prefill_commit(self) -> None:
        """End the running step."""
        assert self.prefill_step is not None
        batch, token_ids = self.prefill_step
        self.prefill_step = None
        if token_ids is None:
            token_ids = self.prefill_memory.run(batch)
        for sequence, token_id in self.prefill.commit(token_ids):
            assert self.handoffs.lease(sequence.request_id) is not None
            if token_id is not None:
                first = FirstToken(
                    request_id=sequence.request_id,
                    index=sequence.num_output_tokens - 1,
                    token_id=token_id,
                    finish_reason=sequence.finish_reason(),
                    num_cached_tokens=sequence.num_cached,
                )
                self._post("prefill>router", partial(self._from_worker, PREFILL, first))
            self.to_prefill(hand.Computed(sequence.request_id, finished=token_id is not None))

    # Decode ----------------------------------------------------------------------------------

    def _decode_hears(self, message: Message) -> None:
        self.to_decode(adm.FromPeer(b"prefill", message))  # type: ignore[arg-type]

    def _prefill_hears(self, message: Message) -> None:
        self.to_prefill(message)  # type: ignore[arg-type]

    def to_decode(self, event: adm.Event) -> None:
        """Give the decode worker an event and carry out what it wants."""
        for action in self.admission.handle(event, self.now):
            match action:
                case adm.Reply(_, message):
                    self._post("decode>prefill", partial(self._prefill_hears, message))
                    if isinstance(message, Accepted) and self.random.random() < 0.2:  # twice
                        self._post("decode>prefill", partial(self._prefill_hears, message))
                case adm.OpenReceive(grant_id, blocks):
                    assert grant_id not in self.receives
                    self.receives[grant_id] = list(blocks)
                case adm.CloseReceive(grant_id):
                    self._post(f"closing {grant_id}", partial(self._closed, grant_id))
                case adm.Admit(sequence, router_id, deadline):
                    self.residents.add(sequence.request_id, Resident(router_id, deadline))
                    self.decode.add(sequence)
                case adm.Abandon(request_id):
                    self._drop_resident(request_id)
                case adm.Report(_, failed):
                    self._post("decode>router", partial(self._from_worker, DECODE, failed))

    def _drop_resident(self, request_id: str) -> None:
        self.residents.remove(request_id)
        self.decode.cancel(request_id)

    def decode_schedule(self) -> None:
        """Begin a step; the engine writes now or only when the step ends."""
        batch = self.decode.schedule()
        if batch.rows:
            early = self.random.random() < 0.5
            self.decode_step = batch, self.decode_memory.run(batch) if early else None

    def decode_commit(self) -> None:
        """End the running step."""
        assert self.decode_step is not None
        batch, token_ids = self.decode_step
        self.decode_step = None
        for new in self.decode.commit(token_ids or self.decode_memory.run(batch)):
            update = TokenUpdate(
                request_id=new.sequence.request_id,
                index=new.sequence.num_output_tokens - 1,
                token_ids=[new.token_id],
                finish_reason=new.finish_reason,
            )
            if new.finish_reason is not None:
                self.residents.remove(new.sequence.request_id)
            self._post("decode>router", partial(self._from_worker, DECODE, update))
        self.to_decode(adm.Tick())

    # The transport ---------------------------------------------------------------------------

    def copy(self, shipment: Shipment) -> None:
        """Move a shipment's blocks, if decode still lets them in."""
        order = shipment.order
        self._assert_source_unchanged(shipment)
        shipment.copied = True
        shipment.digests = [hash(tuple(row)) for row in shipment.expected]
        end = order.first + len(order.source)
        if order.grant_id not in self.receives:
            return  # nobody claims the message
        assert order.destination == self.receives[order.grant_id][order.first : end]
        written = set(order.destination)
        assert any(written <= set(blocks) for blocks in self.admission.owned_blocks())
        assert not any(written & set(blocks) for blocks in self.decode.owned_blocks())
        for block, row in zip(order.destination, shipment.expected, strict=True):
            damaged, self.corrupt = self.corrupt, False
            self.decode_memory.rows[block] = [~value for value in row] if damaged else list(row)
        rows = [self.decode_memory.rows[block] for block in order.destination]
        received = adm.Received(order.grant_id, order.first, [hash(tuple(row)) for row in rows])
        # In order with the grant's own Closed; grants overtake one another.
        self._post(f"received {order.grant_id}", lambda: self.to_decode(received))

    def finish(self, shipment: Shipment) -> None:
        """Tell prefill that a shipment is done."""
        self._assert_source_unchanged(shipment)
        self.shipments.remove(shipment)
        order = shipment.order
        self.to_prefill(hand.Shipped(order.grant_id, order.first, shipment.digests))

    def fail_send(self, shipment: Shipment) -> None:
        """The transport gives a shipment up."""
        self.shipments.remove(shipment)
        order = shipment.order
        self.to_prefill(hand.ShipFailed(order.grant_id, order.first, "connection reset"))

    def fail_receive(self, grant_id: int) -> None:
        """Decode's side of the connection breaks under a grant."""
        self.to_decode(adm.ReceiveFailed(grant_id, "connection reset"))

    def _closed(self, grant_id: int) -> None:
        del self.receives[grant_id]
        self.channels.pop(f"received {grant_id}", None)  # too late to matter
        self.to_decode(adm.Closed(grant_id))

    def _assert_source_unchanged(self, shipment: Shipment) -> None:
        rows = self.prefill_memory.rows
        assert [rows[block] for block in shipment.order.source] == shipment.expected

    # The schedule ----------------------------------------------------------------------------

    def _post(self, channel: str, deliver: Callable[[], None]) -> None:
        self.channels.setdefault(channel, deque()).append(deliver)

    def deliver(self, channel: str) -> None:
        """The oldest message of a channel arrives."""
        queue = self.channels[channel]
        deliver = queue.popleft()
        if not queue:
            del self.channels[channel]
        deliver()

    def events(self) -> list[Callable[[], None]]:
        """Everything that can happen next, faults left out."""
        events: list[Callable[[], None]] = [
            partial(self.deliver, channel) for channel in self.channels
        ]
        for shipment in self.shipments:
            move = self.finish if shipment.copied else self.copy
            events.append(partial(move, shipment))
        events.append(self.prefill_commit if self.prefill_step else self.prefill_schedule)
        events.append(self.decode_commit if self.decode_step else self.decode_schedule)
        return events

    def faults(self) -> list[Callable[[], None]]:
        """Everything that can go wrong next."""
        faults: list[Callable[[], None]] = [
            self.damage,
            *[lambda: self.tick(self.random.uniform(0.0, 8.0))] * 3,
            lambda: self._decode_hears(Revoke(request_id="unknown", grant_id=3)),
        ]
        between_workers = {"prefill>decode", "decode>prefill"} & self.channels.keys()
        faults += [partial(self.lose, c) for c in sorted(between_workers)]
        faults += [partial(self.fail_send, s) for s in self.shipments]
        faults += [partial(self.fail_receive, g) for g in self.receives]
        faults += [partial(self.cancel, r) for r in self.requests.values()]
        faults += [partial(self.give_up, w) for w in (PREFILL, DECODE)]
        faults += [partial(self.drop_router, w) for w in (PREFILL, DECODE)]
        return faults

    def damage(self) -> None:
        """The next copy arrives damaged."""
        self.corrupt = True

    def lose(self, channel: str) -> None:
        """A full queue or a broken link swallows a control message."""
        self.lost = True
        queue = self.channels[channel]
        queue.popleft()
        if not queue:
            del self.channels[channel]

    def give_up(self, worker_id: str) -> None:
        """The router takes a worker for lost; the worker hears nothing but the cancels."""
        for request in self.requests.values():
            self._to_lifecycle(request, WorkerLost(worker_id))

    def drop_router(self, worker_id: str) -> None:
        """A worker takes the router for lost, drops its work and says so."""
        if worker_id == PREFILL:
            self.to_prefill(hand.RouterLost("router"))
        else:
            for request_id in self.residents.of_router("router"):
                self._drop_resident(request_id)
            self.to_decode(adm.RouterLost("router"))
        side = "prefill" if worker_id == PREFILL else "decode"
        self._post(f"{side}>router", partial(self.give_up, worker_id))

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass on both workers."""
        self.now += seconds
        self.to_prefill(hand.Tick())
        self.to_decode(adm.Tick())
        for request_id in self.residents.expired(self.now):
            self._drop_resident(request_id)
            failed = RequestFailed(request_id=request_id, code=DeadlineError.code, message="late")
            self._post("decode>router", partial(self._from_worker, DECODE, failed))

    def step(self, fault_rate: float = 0.0) -> None:
        """Let one event happen and audit both workers."""
        source = self.faults() if self.random.random() < fault_rate else self.events()
        self.random.choice(source)()
        self.check()

    def check(self) -> None:
        """Every block reference has exactly one owner, on both workers."""
        owned = [*self.prefill.owned_blocks(), *self.handoffs.owned_blocks()]
        self.prefill.pool.check_integrity(owned)
        owned = [*self.decode.owned_blocks(), *self.admission.owned_blocks()]
        self.decode.pool.check_integrity(owned)

    def settle(self, max_events: int = 20_000) -> None:
        """Let things happen, without faults, until nothing is left.

        Time passes only if a message was lost: it is noticed when its answer is overdue.
        """
        for num_events in range(max_events):
            if num_events % 50 == 0:
                self.tick()
            if self.lost and num_events % 600 == 599:
                self.tick(10.0)
            self.step()
            if self.idle():
                return
        raise AssertionError(f"never idle: {self.channels.keys()}, {self.unfinished()}")

    def unfinished(self) -> list[str]:
        """Requests whose client still waits."""
        items = self.requests.items()
        return [i for i, r in items if r.lifecycle.state is not RequestState.ENDED]

    def idle(self) -> bool:
        """Whether every request is over and nothing is left of it anywhere."""
        return not (
            self.unfinished()
            or self.channels
            or self.shipments
            or self.receives
            or self.prefill_step
            or self.decode_step
            or self.prefill.waiting
            or self.prefill.running
            or self.decode.num_waiting
            or self.decode.running
            or len(self.residents)
            or self.handoffs.num_open
            or self.admission.num_open
            or self.prefill.pool.num_used
            or self.decode.pool.num_used
        )
