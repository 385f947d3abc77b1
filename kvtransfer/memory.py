"""Memory of this host as a transport: the receiver copies rows out of the sender's arena.

The sender connects to the receiver's Unix socket and passes the file of its arena along, once; the
receiver maps it for reading. From then on a message is an offer of a few bytes, tag and block ids;
the receiver copies the rows into its own arena, digests included, and acknowledges.

Who owns memory: destination blocks are written by their owner alone. Source blocks are the peer's
to read until its ack has come **or the sender has closed the socket**. The receiver's ack is
therefore its commit: it follows the copy, and one that finds the socket closed makes the receive
fail, since the source may have changed. The memory of a killed sender stays mapped and whole.

Both ends belong to one user. Whatever else a peer says is checked, and who breaks the rules is hung
up on. The socket is in the abstract namespace, under a name nobody can guess: it leaves no file,
and no other host, network namespace or container can reach it.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.block_copy import copy_blocks
from kernels.shared_memory import shared_file
from kvtransfer.memory_frames import Offer, is_same_user, packet_socket, send_hello
from kvtransfer.memory_peers import DESCRIPTION, Incoming, Outgoing, Transfer
from kvtransfer.transport import Buffer, Message, Rows, TransportError
from kvtransfer.wakeup import WakeUp

SCHEME = b"memory:"
MAX_CONNECTIONS = 256  # that reach this end
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE = 1.0  # seconds without accepting after that


@dataclass(frozen=True, slots=True)
class _Copy:
    """A receive that has begun."""

    peer: Incoming
    offer: Offer
    rows: Rows
    operation: Transfer


class MemoryTransport:
    """One end, whose arena is ``rows``; only from memory that others may map can it send."""

    description = DESCRIPTION

    def __init__(self, rows: Tensor, name: bytes | None = None) -> None:
        """``name`` is the socket's; the default is one nobody has had."""
        self._row_bytes, self._num_blocks = rows.shape[1] * rows.element_size(), rows.shape[0]
        self._file = shared_file(rows)
        name = name or b"kvferry-" + secrets.token_hex(16).encode()
        self.address = SCHEME + name
        self._listener = packet_socket()
        try:
            self._listener.bind(b"\0" + name)
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise TransportError(f"cannot listen on {self.address!r}: {error}") from error
        self.num_strangers = 0
        self._accept_from: float | None = None  # when accepting has been paused
        self._ends: dict[int, Outgoing | Incoming] = {}  # by descriptor
        self._inbox: deque[tuple[Incoming, Offer]] = deque()  # not probed
        self._copies: deque[_Copy] = deque()
        self._wake = WakeUp()
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)

    @classmethod
    def factory(cls, rows: Tensor, name: bytes | None = None) -> Callable[[], MemoryTransport]:
        """What a TransferThread calls, on its own thread."""
        return lambda: cls(rows, name)

    def fileno(self) -> int:
        """A descriptor that is readable while a peer has something to say."""
        return self._epoll.fileno()

    def connect(self, address: bytes) -> Outgoing:
        """See Transport. A peer that is not there raises TransportError."""
        if self._file is None:
            raise TransportError("this end's arena is not in memory that others may map")
        if not address.startswith(SCHEME):
            raise TransportError(f"not an address of memory on this host: {address!r}")
        peer = packet_socket()
        try:
            peer.connect(b"\0" + address.removeprefix(SCHEME))
            if not is_same_user(peer):
                raise PermissionError("it belongs to another user")
            send_hello(peer, self._row_bytes, self._num_blocks, self._file)
        except OSError as error:
            peer.close()
            raise TransportError(f"cannot reach {address!r}: {error}") from error
        connection = Outgoing(peer)
        self._watch(connection)
        return connection

    def send(self, connection: Outgoing, tag: int, buffer: Rows) -> Transfer:
        """See Transport. ``buffer.memory`` is the arena this end was made for."""
        if not connection.open:
            raise TransportError("the connection is lost")
        operation = connection.offer(tag, buffer.blocks)
        try:
            connection.flush()
        except OSError as error:
            self._lose(connection, f"peer lost: {error}")
        return operation

    def probe(self) -> Message | None:
        """See Transport."""
        if not self._inbox:
            return None
        peer, offer = self._inbox.popleft()
        return Message(offer.tag, offer.num_bytes, (peer, offer), in_place=True)

    def receive(self, message: Message, buffer: Buffer | Rows) -> Transfer:
        """See Transport. What is not ``Rows`` of the message's shape is too short."""
        peer, offer = message.handle
        operation = Transfer()
        if not peer.open:
            operation.end("connection closed by the peer")
        elif isinstance(buffer, Rows) and _fits(offer, buffer):
            self._copies.append(_Copy(peer, offer, buffer, operation))
        else:
            self._acknowledge(peer, offer)
            operation.end("message truncated")
        return operation

    def progress(self) -> bool:
        """See Transport. Copies one message at most, so that other work is not kept waiting."""
        self._accept_again()
        ready = self._epoll.poll(0)
        for descriptor, _ in ready:
            if descriptor == self._wake.fileno():
                self._wake.clear()
            elif descriptor == self._listener.fileno():
                self._accept()
            else:
                end = self._ends.get(descriptor)
                if isinstance(end, Outgoing):
                    self._take_acks(end)
                elif end is not None:
                    self._take_offers(end)
        return self._copy() or bool(ready)

    def wait(self, timeout: float) -> None:
        """See Transport."""
        self._epoll.poll(timeout)

    def wake(self) -> None:
        """See Transport."""
        self._wake.ring()

    def close(self, connection: Outgoing) -> None:
        """See Transport."""
        self._lose(connection, "connection closed")

    def close_incoming(self) -> None:
        """See Transport."""
        for end in list(self._ends.values()):
            if isinstance(end, Incoming):
                self._hang_up(end)

    def shutdown(self) -> None:
        """See Transport."""
        for end in list(self._ends.values()):
            if isinstance(end, Outgoing):
                self.close(end)
        self.close_incoming()
        self._listener.close()
        self._epoll.close()
        self._wake.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:  # it has gone again, or there is no room for it
            if error.errno in NO_DESCRIPTORS:
                self._epoll.modify(self._listener, 0)  # it would stay readable
                self._accept_from = time.monotonic() + PAUSE
            return
        peer.setblocking(False)
        incoming = sum(isinstance(end, Incoming) for end in self._ends.values())
        if incoming < MAX_CONNECTIONS and is_same_user(peer):
            self._watch(Incoming(peer))
        else:
            self.num_strangers += 1
            peer.close()

    def _accept_again(self) -> None:
        if self._accept_from is not None and time.monotonic() >= self._accept_from:
            self._epoll.modify(self._listener, select.EPOLLIN)
            self._accept_from = None

    def _take_acks(self, connection: Outgoing) -> None:
        try:
            connection.take_acks()
        except (OSError, ValueError) as error:
            self._lose(connection, f"peer lost: {error}")

    def _take_offers(self, peer: Incoming) -> None:
        try:
            self._inbox.extend((peer, offer) for offer in peer.take_offers())
        except OSError:
            self._hang_up(peer)
        except ValueError:
            self.num_strangers += 1
            self._hang_up(peer)

    def _copy(self) -> bool:
        if not self._copies:
            return False
        copy = self._copies.popleft()
        digests = copy_blocks(
            copy.offer.source, copy.offer.block_ids, copy.rows.memory, copy.rows.blocks
        )
        if self._acknowledge(copy.peer, copy.offer):
            copy.operation.digests = digests
            copy.operation.end(None)
        else:
            copy.operation.end("connection closed by the peer")
        return True

    def _acknowledge(self, peer: Incoming, offer: Offer) -> bool:
        """Whether the socket was still open at the other end."""
        try:
            peer.acknowledge(offer)
        except OSError:
            self._hang_up(peer)
            return False
        return True

    def _lose(self, connection: Outgoing, reason: str) -> None:
        """Close the socket, and only then let the source blocks go. Idempotent."""
        self._unwatch(connection)
        connection.end(reason)

    def _hang_up(self, peer: Incoming) -> None:
        """Close the socket. Offers that nobody has seen are dropped; receives fail. Idempotent."""
        self._unwatch(peer)
        self._inbox = deque(entry for entry in self._inbox if entry[0] is not peer)
        for copy in [copy for copy in self._copies if copy.peer is peer]:
            self._copies.remove(copy)
            copy.operation.end("connection closed by the peer")

    def _watch(self, end: Outgoing | Incoming) -> None:
        self._ends[end.socket.fileno()] = end
        self._epoll.register(end.socket, select.EPOLLIN)

    def _unwatch(self, end: Outgoing | Incoming) -> None:
        if not end.open:
            return
        end.open = False
        del self._ends[end.socket.fileno()]
        self._epoll.unregister(end.socket)
        with contextlib.suppress(OSError):  # it is gone already
            end.socket.shutdown(socket.SHUT_RDWR)  # at once, even if a fork still holds it
        end.socket.close()


def _fits(offer: Offer, rows: Rows) -> bool:
    theirs, mine = offer.source.shape[1], rows.memory.shape[1]
    return len(offer.block_ids) == len(rows.blocks) and theirs == mine
