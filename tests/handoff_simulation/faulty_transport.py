"""The in-process transport with everything going wrong that may, whenever somebody says so.

A message waits on its connection until it is let go, and a receive until it is completed: each of
these is one of ``events()``. Some messages, as chance decides, are eager: their send ends at
once, as UCX's does for small ones, so that a hand-off may overtake its blocks. A fault that is
armed befalls the next message; ``faults()`` breaks connections and receives under way. What was
under way on a broken connection ends later still, and is the transport's until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from random import Random

import numpy as np

from kvtransfer.inproc import InProcessNetwork, InProcessTransport, _Connection, _Transfer
from kvtransfer.transport import Buffer, Message, TransportError


class Fault(Enum):
    """What may befall one message."""

    DROP = auto()  # it never arrives
    DUPLICATE = auto()  # it arrives twice
    TRUNCATE = auto()  # its end is missing
    CORRUPT = auto()  # one bit of its bytes is another
    RETAG = auto()  # one bit of its tag is another

    @property
    def loses(self) -> bool:
        """Whether only a timer can notice what is missing."""
        return self in (Fault.DROP, Fault.TRUNCATE, Fault.RETAG)


@dataclass(slots=True, eq=False)
class _Sent:
    """A message from its send until it is received."""

    connection: _Connection
    tag: int
    buffer: Buffer  # the sender's own memory, unless it is eager
    content: bytes  # when it was sent
    operation: _Transfer
    inner: _Transfer | None = None  # once it was let go


@dataclass(slots=True, eq=False)
class _Received:
    """A receive from its beginning to its end."""

    message: Message
    buffer: Buffer
    operation: _Transfer


class FaultyTransport(InProcessTransport):
    """One end. Its peers on the network are of this kind, too."""

    def __init__(self, network: InProcessNetwork, address: bytes, random: Random) -> None:
        super().__init__(network, address)
        self.armed: Fault | None = None
        self.num_let_go = 0  # messages
        self.eager = 0.5  # share of the messages
        self._random = random
        self._waiting: list[_Sent] = []  # oldest first
        self._let_go: list[_Sent] = []
        self._receiving: list[_Received] = []
        self._broken: list[tuple[_Sent, str]] = []  # they end later, with this reason

    @property
    def asleep(self) -> bool:
        """Whether ``wait`` would not return."""
        return not self._wake.is_set()

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way."""
        under_way = self._under_way() or self._receiving or self._broken
        return not (under_way or self._inbox)

    def reading(self) -> list[Buffer]:
        """Memory that is the transport's until the messages in it end."""
        sent = [*self._under_way(), *(sent for sent, _ in self._broken)]
        return [message.buffer for message in sent if not message.operation.done]

    def events(self) -> list[Callable[[], None]]:
        """What can happen next to the messages of this end."""
        first = {id(sent.connection): sent for sent in reversed(self._waiting)}
        return [
            *(partial(self._release, sent) for sent in first.values()),
            *(partial(self._complete, received) for received in self._receiving),
            *(partial(self._give_back, sent, reason) for sent, reason in self._broken),
        ]

    def faults(self) -> list[Callable[[], None]]:
        """What can go wrong with them."""
        under_way = {id(sent.connection): sent.connection for sent in self._under_way()}
        return [
            *(partial(self.break_connection, connection) for connection in under_way.values()),
            *(partial(self._tear, received) for received in self._receiving),
        ]

    def send(self, connection: _Connection, tag: int, buffer: Buffer) -> _Transfer:
        """See Transport."""
        if connection.closed:
            raise TransportError("the connection is lost")
        sent = _Sent(connection, tag, buffer, bytes(buffer), _Transfer())
        if self._random.random() < self.eager:
            sent.buffer = np.frombuffer(sent.content, np.uint8)
            sent.operation.end(None)
        self._waiting.append(sent)
        return sent.operation

    def receive(self, message: Message, buffer: Buffer) -> _Transfer:
        """See Transport."""
        received = _Received(message, buffer, _Transfer())
        self._receiving.append(received)
        return received.operation

    def progress(self) -> bool:
        """See Transport."""
        ended = [sent for sent in self._let_go if sent.inner is not None and sent.inner.done]
        for sent in ended:
            self._let_go.remove(sent)
            self._end(sent, sent.inner.error if sent.inner else None)
        return bool(ended)

    def close(self, connection: _Connection) -> None:
        """See Transport."""
        self.break_connection(connection, "connection closed")

    def close_incoming(self) -> None:
        """See Transport."""
        for end in self._network.ends.values():
            assert isinstance(end, FaultyTransport)
            for sent in end._under_way():
                if sent.connection.address == self.address:
                    end.break_connection(sent.connection)

    def break_connection(self, connection: _Connection, reason: str = "connection reset") -> None:
        """Both ends lose what is under way on a connection."""
        super().close(connection)
        peer = self._network.ends[connection.address]
        assert isinstance(peer, FaultyTransport)
        for received in list(peer._receiving):
            if received.message.handle.connection is connection:
                peer._tear(received)
        for sent in self._under_way():
            if sent.connection is connection:
                (self._waiting if sent in self._waiting else self._let_go).remove(sent)
                self._broken.append((sent, reason))
        self.wake()
        peer.wake()

    def _under_way(self) -> list[_Sent]:
        return [*self._waiting, *self._let_go]

    def _release(self, sent: _Sent) -> None:
        """Let a message go, with the fault that is armed."""
        self._waiting.remove(sent)
        self._let_go.append(sent)
        self.num_let_go += 1
        fault, self.armed = self.armed, None
        copy = np.frombuffer(sent.content, np.uint8).copy()
        tag, buffer = sent.tag, sent.buffer
        match fault:
            case Fault.DROP:
                if sent.operation.done:
                    self._let_go.remove(sent)
                return
            case Fault.DUPLICATE:
                super().send(sent.connection, tag, copy)
            case Fault.TRUNCATE:
                buffer = copy[: self._random.randrange(len(copy))]
            case Fault.CORRUPT:
                copy[self._random.randrange(len(copy))] ^= 1 << self._random.randrange(8)
                buffer = copy
            case Fault.RETAG:
                tag ^= 1 << self._random.randrange(64)
        sent.inner = super().send(sent.connection, tag, buffer)

    def _complete(self, received: _Received) -> None:
        self._receiving.remove(received)
        inner = super().receive(received.message, received.buffer)
        received.operation.end(inner.error)
        self.wake()

    def _tear(self, received: _Received) -> None:
        """A receive is lost half way; what it leaves is garbage."""
        self._receiving.remove(received)
        if len(received.buffer) >= received.message.length:
            received.buffer[: received.message.length // 2] = 0xEE
        received.operation.end("connection reset")
        parcel = received.message.handle
        if not parcel.operation.done:
            parcel.operation.end(None)
        parcel.sender.wake()
        self.wake()

    def _give_back(self, sent: _Sent, reason: str) -> None:
        """Only now is the memory of a message on a broken connection the sender's again."""
        self._broken.remove((sent, reason))
        self._end(sent, reason)
        self.wake()

    def _end(self, sent: _Sent, error: str | None) -> None:
        if sent.operation.done:  # it was eager
            return
        assert bytes(sent.buffer) == sent.content, "blocks were reused while they were being sent"
        sent.operation.end(error)
