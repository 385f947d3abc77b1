"""The sending half of the block protocol: batches of blocks, cut into messages, peer by peer.

A batch's life: ``queued`` on its peer's link; its messages go out in order, as many at once as
the link may have under way; the blocks' digests come from packing them or, of messages that leave
straight from the arena, are computed while the wire is busy; then it ends with exactly one
``BlocksSent`` or ``SendFailed``, and only then may its source blocks be reused.

One failed message fails its link: the connection is closed, and every batch of the link ends once
none of its messages can touch memory any more. The next batch to the same address connects anew.
A link that moves nothing for ``stall`` seconds fails the same way, so a frozen peer costs others
nothing but the few staging slots it may hold meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.arena import Arena, Staging
from kvtransfer.config import TransferConfig
from kvtransfer.events import BlocksSent, Counters, SendFailed, TransferEvent
from kvtransfer.transport import (
    AnyTransport,
    Buffer,
    Connection,
    Operation,
    Rows,
    TransportError,
)
from kvtransfer.wire import Piece, Tag, cut, cut_evenly


@dataclass(slots=True)
class _Batch:
    grant_id: int
    first: int
    unsent: deque[Piece]
    unfinished: int  # messages not yet ended
    undigested: deque[Piece] = field(default_factory=deque)  # on the wire, or past it
    digests: dict[int, list[int]] = field(default_factory=dict)  # by a message's first position

    @property
    def over(self) -> bool:
        """Whether all of it is sent and its digests are known."""
        return not (self.unsent or self.unfinished or self.undigested)

    def all_digests(self) -> list[int]:
        """One for each position, in order."""
        return [digest for first in sorted(self.digests) for digest in self.digests[first]]


@dataclass(slots=True)
class _Sending:
    operation: Operation
    batch: _Batch
    num_bytes: int
    slot: int | None  # staging slot it is sent from


@dataclass(slots=True)
class _Link:
    """One peer: its connection and what is on the way there."""

    address: bytes
    connection: Connection
    moved: float  # when something last ended or began
    batches: deque[_Batch] = field(default_factory=deque)  # oldest first
    sending: list[_Sending] = field(default_factory=list)
    failure: str | None = None  # set once, when the connection is given up


class Sender:
    """Sends from ``arena``. Every call is made on the transfer thread."""

    def __init__(
        self,
        arena: Arena,
        transport: AnyTransport,
        config: TransferConfig,
        counters: Counters,
        report: Callable[[TransferEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arena = arena
        self._transport = transport
        self._config = config
        self._counters = counters
        self._report = report
        self._clock = clock
        self._staging = Staging(arena, config.staging_slots, config.staging_bytes)
        self._slots_per_link = max(config.staging_slots // 4, 1)  # no peer takes them all
        self._links: dict[bytes, _Link] = {}
        self._failed: list[_Link] = []  # given up, with messages that have not ended yet

    @property
    def busy(self) -> bool:
        """Whether any message is under way."""
        return bool(self._failed) or any(link.sending for link in self._links.values())

    def send(
        self,
        address: bytes,
        grant_id: int,
        first: int,
        source: Sequence[int],
        destination: Sequence[int],
    ) -> None:
        """Queue a batch; it ends with one event."""
        link = self._links.get(address)
        if link is None:
            try:
                connection = self._transport.connect(address)
            except TransportError as error:
                self._counters.failed_sends += 1
                self._report(SendFailed(grant_id, first, str(error)))
                return
            link = self._links[address] = _Link(address, connection, self._clock())
        arena, config = self._arena, self._config
        if link.connection.in_place:
            pieces = cut_evenly(first, source, arena.row_bytes, config.in_place_bytes)
        elif arena.layout is not None:
            pieces = cut_evenly(first, source, arena.wire_bytes, config.staging_bytes)
        else:
            pieces = cut(first, source, destination, arena.row_bytes, config)
        link.batches.append(_Batch(grant_id, first, deque(pieces), len(pieces)))

    def disconnect(self, address: bytes, reason: str) -> None:
        """Give a peer up; its batches fail. Unknown addresses are ignored."""
        link = self._links.get(address)
        if link is not None:
            self._fail(link, reason)

    def step(self) -> bool:
        """Take what has ended, send more, compute one message's digests; whether any was there."""
        moved = False
        for link in list(self._links.values()):
            moved |= self._collect(link)
            moved |= self._fill(link)
            moved |= self._digest(link)
            if link.sending and self._clock() - link.moved > self._config.stall:
                self._fail(link, f"nothing was sent for {self._config.stall:g} s")
        for link in list(self._failed):
            moved |= self._drain(link)
        self._counters.sends_in_flight = sum(
            len(link.sending) for link in (*self._links.values(), *self._failed)
        )
        return moved

    def _collect(self, link: _Link) -> bool:
        ended = [sending for sending in link.sending if sending.operation.done]
        for sending in ended:
            link.sending.remove(sending)
            self._release(sending)
            sending.batch.unfinished -= 1
            error = sending.operation.error
            if error is None:
                self._counters.messages_sent += 1
                self._counters.bytes_sent += sending.num_bytes
            else:
                self._fail(link, error)
        if ended:
            link.moved = self._clock()
            self._finish(link)
        return bool(ended)

    def _fill(self, link: _Link) -> bool:
        if link.failure is not None:
            return False
        begun = 0
        for batch in link.batches:
            while batch.unsent and len(link.sending) < self._config.max_in_flight:
                if not self._begin(link, batch, batch.unsent[0]):
                    break
                batch.unsent.popleft()
                begun += 1
            if batch.unsent:
                break
        if begun:
            link.moved = self._clock()
            self._counters.connections[_text(link.address)] = link.connection.description
        return begun > 0

    def _begin(self, link: _Link, batch: _Batch, piece: Piece) -> bool:
        """Send one message, unless it needs a staging slot and none is free for this link."""
        count, slot, in_place = len(piece.source), None, link.connection.in_place
        num_bytes = count * (self._arena.row_bytes if in_place else self._arena.wire_bytes)
        buffer: Buffer | Rows
        if in_place:
            buffer = Rows(self._arena.bytes, piece.source)
        elif self._arena.is_straight(piece.source):
            buffer = self._arena.run(piece.source)
        else:
            held = sum(sending.slot is not None for sending in link.sending)
            if not self._staging.num_free or held >= self._slots_per_link:
                return False
            slot = self._staging.acquire()
            batch.digests[piece.first] = self._staging.gather(slot, piece.source)
            buffer = self._staging.buffer(slot, count)
        tag = Tag(batch.grant_id, piece.first, count).pack()
        try:
            operation = self._transport.send(link.connection, tag, buffer)
        except TransportError as error:
            if slot is not None:
                self._staging.release(slot)
            self._fail(link, str(error))
            return False
        link.sending.append(_Sending(operation, batch, num_bytes, slot))
        if slot is None:
            batch.undigested.append(piece)
        return True

    def _digest(self, link: _Link) -> bool:
        """Checksum the blocks of one message, while it and others are on the wire."""
        for batch in link.batches:
            if batch.undigested:
                piece = batch.undigested.popleft()
                batch.digests[piece.first] = self._arena.digests(piece.source)
                self._finish(link)
                return True
        return False

    def _finish(self, link: _Link) -> None:
        """Report the batches that are over, wherever in the queue they stand."""
        if link.failure is not None:
            return
        for batch in [batch for batch in link.batches if batch.over]:
            link.batches.remove(batch)
            self._report(BlocksSent(batch.grant_id, batch.first, batch.all_digests()))

    def _fail(self, link: _Link, reason: str) -> None:
        """Close the connection; ``_drain`` ends the batches when their memory is free."""
        if link.failure is not None:
            return
        link.failure = reason
        if self._links.get(link.address) is link:
            del self._links[link.address]
        self._counters.connections.pop(_text(link.address), None)
        self._failed.append(link)
        self._transport.close(link.connection)

    def _drain(self, link: _Link) -> bool:
        if not self._collect(link) and link.sending:
            return False
        if not link.sending:
            self._failed.remove(link)
            assert link.failure is not None
            self._counters.failed_sends += len(link.batches)
            for batch in link.batches:
                self._report(SendFailed(batch.grant_id, batch.first, link.failure))
        return True

    def _release(self, sending: _Sending) -> None:
        if sending.slot is not None:
            self._staging.release(sending.slot)


def _text(address: bytes) -> str:
    return address.decode(errors="replace")
