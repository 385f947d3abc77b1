"""The two ends of one memory connection: who offers blocks of its arena, and who copies them.

Neither closes its socket: that is the transport's, which is told by an exception when a peer is
lost (OSError) or says what a peer of ours would not (ValueError).
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvtransfer.memory_frames import Offer, pack_offer, read_ack, read_hello, read_offer, send_ack

DESCRIPTION = "memory/memfd"
MAX_UNACKED = 128  # offers of one connection; their acks fit a socket's buffer unread


@dataclass(slots=True)
class Transfer:
    """An Operation."""

    done: bool = False
    error: str | None = None
    digests: list[int] | None = None

    def end(self, error: str | None) -> None:
        """Once only."""
        assert not self.done, "an operation ended twice"
        self.done, self.error = True, error


@dataclass(slots=True, eq=False)
class Outgoing:
    """A Connection."""

    socket: socket.socket
    open: bool = True
    description: str = DESCRIPTION
    in_place: bool = True
    _waiting: deque[bytes] = field(default_factory=deque)  # offers without room on the socket
    _operations: dict[int, Transfer] = field(default_factory=dict)  # not ended, by offer's number
    _next_number: int = 0

    def offer(self, tag: int, block_ids: Sequence[int]) -> Transfer:
        """Queue an offer, for ``flush``; the operation ends with the peer's ack."""
        number, operation = self._next_number, Transfer()
        self._next_number += 1
        self._operations[number] = operation
        self._waiting.append(pack_offer(number, tag, block_ids))
        return operation

    def flush(self) -> None:
        """Send what is queued. What finds no room goes when acks come: they will, for the rest."""
        with contextlib.suppress(BlockingIOError):
            while self._waiting and len(self._operations) - len(self._waiting) < MAX_UNACKED:
                self.socket.send(self._waiting[0])
                self._waiting.popleft()

    def take_acks(self) -> None:
        """End the operations that the peer has acknowledged."""
        with contextlib.suppress(BlockingIOError):
            while True:
                operation = self._operations.pop(read_ack(self.socket), None)
                if operation is None:
                    raise ValueError("an ack of what was not offered")
                operation.end(None)
        self.flush()

    def end(self, reason: str) -> None:
        """The socket is closed: fail what has not ended."""
        self._waiting.clear()
        for operation in self._operations.values():
            operation.end(reason)
        self._operations.clear()


@dataclass(slots=True, eq=False)
class Incoming:
    """A peer that reaches us."""

    socket: socket.socket
    open: bool = True
    _arena: NDArray[np.uint8] | None = None  # [num_blocks, row_bytes], once it has said hello
    _unacked: set[int] = field(default_factory=set)  # numbers of offers

    def take_offers(self) -> Iterator[Offer]:
        """The offers that have arrived."""
        with contextlib.suppress(BlockingIOError):
            if self._arena is None:
                self._arena = read_hello(self.socket)
            while True:
                offer = read_offer(self.socket, self._arena)
                if offer.number in self._unacked or len(self._unacked) == MAX_UNACKED:
                    raise ValueError("more offers than may be open, or one of them twice")
                self._unacked.add(offer.number)
                yield offer

    def acknowledge(self, offer: Offer) -> None:
        """Say that an offer has been taken. Raises OSError if the peer has closed the socket.

        Also when it leaves more acks unread than it may have offers.
        """
        send_ack(self.socket, offer.number)
        self._unacked.remove(offer.number)
