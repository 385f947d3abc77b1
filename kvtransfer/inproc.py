"""A transport between arenas of one process: the same guarantees, no wire.

A sent message is a parcel in the receiver's inbox that holds the sender's own memory; the bytes
move when it is received, so both operations end at that moment. The network can kill one of its
ends, which then looks to the others as a killed process does.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.transport import Buffer, Message, TransportError


@dataclass(slots=True)
class _Transfer:
    """An Operation."""

    done: bool = False
    error: str | None = None
    digests: None = None

    def end(self, error: str | None) -> None:
        """Once only. ``error`` is set first: the other thread looks at ``done``."""
        assert not self.done, "an operation ended twice"
        self.error = error
        self.done = True


@dataclass(slots=True, eq=False)
class _Connection:
    address: bytes
    description: str = "inproc"
    in_place: bool = False
    closed: bool = False


@dataclass(slots=True, eq=False)
class _Parcel:
    tag: int
    buffer: Buffer
    operation: _Transfer
    connection: _Connection
    sender: InProcessTransport


@dataclass(slots=True)
class InProcessNetwork:
    """The ends that can reach one another."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    ends: dict[bytes, InProcessTransport] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def factory(self, address: bytes | None = None) -> Callable[[], InProcessTransport]:
        """What a TransferThread calls; the default is an address nobody has had."""
        return lambda: InProcessTransport(self, address or b"inproc-%d" % next(self.numbers))

    def kill(self, address: bytes) -> None:
        """Take an end away without warning."""
        self.ends[address].shutdown()


class InProcessTransport:
    """One end. Raises TransportError when the address is taken."""

    description = "in process"
    num_strangers = 0

    def __init__(self, network: InProcessNetwork, address: bytes) -> None:
        self.address = address
        self._network = network
        self._inbox: deque[_Parcel] = deque()
        self._wake = threading.Event()
        self._alive = True
        with network.lock:
            if address in network.ends:
                raise TransportError(f"address {address!r} is in use")
            network.ends[address] = self

    def connect(self, address: bytes) -> _Connection:
        """See Transport."""
        if not address.startswith(b"inproc-"):
            raise TransportError(f"not an address of this process: {address!r}")
        return _Connection(address)

    def send(self, connection: _Connection, tag: int, buffer: Buffer) -> _Transfer:
        """See Transport."""
        operation = _Transfer()
        with self._network.lock:
            peer = self._network.ends.get(connection.address)
            if connection.closed:
                raise TransportError("the connection is closed")
            if peer is None or not self._alive:
                operation.end("peer unreachable")
            else:
                peer._inbox.append(_Parcel(tag, buffer, operation, connection, self))
                peer._wake.set()
        return operation

    def probe(self) -> Message | None:
        """See Transport."""
        with self._network.lock:
            if not self._inbox:
                return None
            parcel = self._inbox.popleft()
            return Message(parcel.tag, len(parcel.buffer), parcel)

    def receive(self, message: Message, buffer: Buffer) -> _Transfer:
        """See Transport."""
        parcel: _Parcel = message.handle
        mine = _Transfer()
        with self._network.lock:
            if parcel.operation.done:
                mine.end(parcel.operation.error)
            elif not self._alive:
                parcel.operation.end("peer lost")
                mine.end("closed")
            else:
                fits = len(buffer) >= message.length
                if fits:
                    buffer[: message.length] = parcel.buffer
                parcel.operation.end(None)
                parcel.sender._wake.set()
                mine.end(None if fits else "message truncated")
        return mine

    def progress(self) -> bool:
        """See Transport. Nothing to do: bytes move in ``receive``."""
        return False

    def wait(self, timeout: float) -> None:
        """See Transport."""
        self._wake.wait(timeout)
        self._wake.clear()

    def wake(self) -> None:
        """See Transport."""
        self._wake.set()

    def close(self, connection: _Connection) -> None:
        """See Transport."""
        with self._network.lock:
            connection.closed = True
            self._drop(lambda parcel: parcel.connection is connection, "connection closed")

    def close_incoming(self) -> None:
        """See Transport."""
        with self._network.lock:
            self._drop(lambda parcel: parcel in self._inbox, "connection closed by the peer")

    def shutdown(self) -> None:
        """See Transport. Idempotent."""
        with self._network.lock:
            self._drop(lambda parcel: parcel.sender is self or parcel in self._inbox, "peer lost")
            self._alive = False
            if self._network.ends.get(self.address) is self:
                del self._network.ends[self.address]

    def _drop(self, lost: Callable[[_Parcel], bool], error: str) -> None:
        """Fail parcels that nobody has claimed. The caller holds the lock."""
        for end in self._network.ends.values():
            for parcel in [parcel for parcel in end._inbox if lost(parcel)]:
                end._inbox.remove(parcel)
                parcel.operation.end(error)
                parcel.sender._wake.set()
