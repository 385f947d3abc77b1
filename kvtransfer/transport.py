"""The interface between the block protocol and whatever moves bytes.

A transport belongs to one thread, which makes every call except ``wake``. It guarantees:

- An operation ends exactly once: ``done`` turns true, and ``error`` says why if it failed. It
  fails when the peer is lost, when its connection is closed, and when the transport shuts down.
- Memory of an operation that has ended is touched no more. (A peer that maps it may read on; then
  its receive fails.)
- A message is received only after ``probe`` has returned it, so no receive is ever posted for
  bytes that may not come. ``probe`` returns each message once, and each must then be received.
- A buffer shorter than its message makes the receive fail, with nothing written to it; the
  sender's operation ends as if the message had been taken.
- Messages of a connection arrive in the order they were sent. Between connections there is none.
- Ends are seen by calling ``progress``; nothing advances in between.

A buffer is contiguous bytes: a one-dimensional uint8 numpy array, or a CUDA tensor of that shape.
A connection that is ``in_place`` takes ``Rows`` of the arena instead, wherever they lie, and so
does the receive of a message that came over one; its operation has the digests of what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocol.errors import KvferryError

Buffer = Any


@dataclass(frozen=True, slots=True)
class Rows:
    """Some blocks of an arena, in this order."""

    memory: NDArray[np.uint8]  # [num_blocks, row_bytes]
    blocks: Sequence[int]


class TransportError(KvferryError):
    """The transport cannot do what was asked, now or with this address."""

    code = "transport_error"


class Operation(Protocol):
    """A send or a receive under way."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""

    @property
    def error(self) -> str | None:
        """Why it failed; None while it runs and when it succeeded."""

    @property
    def digests(self) -> list[int] | None:
        """Of each row that was received in place; None of any other operation."""


class Connection(Protocol):
    """A way to one peer."""

    @property
    def description(self) -> str:
        """What carries it, such as ``tcp/eth0``; may be empty until traffic has flowed."""

    @property
    def in_place(self) -> bool:
        """Whether it takes ``Rows``, which the peer copies from where they lie."""


@dataclass(frozen=True, slots=True)
class Message:
    """Something that arrived and waits to be received."""

    tag: int  # 64 bits, the sender's
    length: int  # bytes
    handle: Any  # the transport's own
    in_place: bool = False  # it is received into Rows


C = TypeVar("C", bound=Connection)  # a transport's own


class Transport(Protocol[C]):
    """One end of the data plane."""

    @property
    def address(self) -> bytes:
        """What a peer passes to ``connect``."""

    @property
    def description(self) -> str:
        """Which library and which kinds of wire this end can use."""

    @property
    def num_strangers(self) -> int:
        """Peers that reached us and were hung up on: not proven, or none of ours."""

    def connect(self, address: bytes) -> C:
        """Begin to reach a peer; a peer that is not there makes the first operations fail.

        Raises TransportError for an address that cannot be understood, or is known to be nobody's.
        """

    def send(self, connection: C, tag: int, buffer: Buffer | Rows) -> Operation:
        """Begin to send; raises TransportError when the connection is known to be lost."""

    def probe(self) -> Message | None:
        """The next message that has arrived, or None."""

    def receive(self, message: Message, buffer: Buffer | Rows) -> Operation:
        """Begin to receive a probed message."""

    def progress(self) -> bool:
        """Advance what is under way; whether anything moved."""

    def wait(self, timeout: float) -> None:
        """Sleep until there is something to progress, ``wake``, or ``timeout`` seconds."""

    def wake(self) -> None:
        """End a ``wait``, from any thread."""

    def close(self, connection: C) -> None:
        """Give the peer up. Operations on it that have not ended fail in later ``progress``."""

    def close_incoming(self) -> None:
        """Give up every peer that reaches us, so that receives from them end."""

    def shutdown(self) -> None:
        """Close everything; every operation has ended when this returns."""


AnyTransport = Transport[Any]
TransportFactory = Callable[[], AnyTransport]
