"""UCX, and memory of this host where the peer is on it too: the choice is made per connection.

An address names both ways, ``HOST:PORT;memory:NAME``. Only a process of the same host, network
namespace and user can connect to the name, and only with an arena of its own that others may map;
whoever cannot takes UCX.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from kvtransfer.memory import MemoryTransport
from kvtransfer.transport import (
    AnyTransport,
    Buffer,
    Connection,
    Message,
    Operation,
    Rows,
    TransportError,
)
from kvtransfer.ucx import SEPARATOR, UCXTransport


class AutoTransport:
    """Both transports as one. It owns them."""

    def __init__(self, ucx: UCXTransport, memory: MemoryTransport) -> None:
        self._ucx = ucx
        self._memory = memory
        self.address = ucx.address + SEPARATOR + memory.address
        self.description = f"{ucx.description} {memory.description}"
        self._next: list[AnyTransport] = [ucx, memory]  # in this order they are probed
        ucx.watch(memory.fileno())

    @property
    def num_strangers(self) -> int:
        """See Transport."""
        return self._ucx.num_strangers + self._memory.num_strangers

    def connect(self, address: bytes) -> Connection:
        """See Transport."""
        memory_address = address.partition(SEPARATOR)[2]
        if memory_address:
            try:
                return self._memory.connect(memory_address)
            except TransportError:  # on another host, or another user's; or we cannot be read
                return self._ucx.connect(address)
        return self._ucx.connect(address)

    def send(self, connection: Connection, tag: int, buffer: Buffer | Rows) -> Operation:
        """See Transport."""
        return self._of(connection).send(connection, tag, buffer)

    def probe(self) -> Message | None:
        """See Transport. The two take turns."""
        self._next.reverse()
        return self._next[0].probe() or self._next[1].probe()

    def receive(self, message: Message, buffer: Buffer | Rows) -> Operation:
        """See Transport."""
        return self._of(message).receive(message, buffer)

    def progress(self) -> bool:
        """See Transport."""
        moved = self._memory.progress()
        return self._ucx.progress() or moved

    def wait(self, timeout: float) -> None:
        """See Transport."""
        self._ucx.wait(timeout)

    def wake(self) -> None:
        """See Transport."""
        self._ucx.wake()

    def close(self, connection: Connection) -> None:
        """See Transport."""
        self._of(connection).close(connection)

    def close_incoming(self) -> None:
        """See Transport."""
        self._memory.close_incoming()
        self._ucx.close_incoming()

    def shutdown(self) -> None:
        """See Transport."""
        self._memory.shutdown()
        self._ucx.shutdown()

    def _of(self, what: Connection | Message) -> AnyTransport:
        return self._memory if what.in_place else self._ucx


def auto_factory(
    rows: Tensor, host: str, port: int = 0, cluster_key: bytes | None = None
) -> Callable[[], AnyTransport]:
    """What a TransferThread calls: both for an arena in this host's memory, else UCX."""
    if rows.is_cuda or not hasattr(os, "memfd_create"):
        return UCXTransport.factory(host, port, cluster_key)
    return lambda: AutoTransport(UCXTransport(host, port, cluster_key), MemoryTransport(rows))
