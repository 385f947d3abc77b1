"""Two workers' data planes with their arenas, on any transport."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from kernels.shared_memory import shared_zeros
from kernels.wire_quantization import PackedLayout
from kvtransfer.auto import auto_factory
from kvtransfer.config import TransferConfig
from kvtransfer.events import BlocksReceived, BlocksSent, Died, TransferEvent
from kvtransfer.inproc import InProcessNetwork
from kvtransfer.memory import SCHEME, MemoryTransport
from kvtransfer.thread import TransferThread
from kvtransfer.transport import TransportFactory
from kvtransfer.ucx import UCXTransport

DEADLINE = 20.0  # seconds
E = TypeVar("E")


class Peer:
    """A transfer thread, its arena, and every event it has reported and nobody has taken."""

    def __init__(
        self,
        rows: torch.Tensor,
        factory: TransportFactory,
        config: TransferConfig,
        layout: PackedLayout | None = None,
    ) -> None:
        self.rows = rows.view(torch.uint8)  # [num_blocks, row_bytes]
        self.wire_bytes = rows.nbytes // len(rows) if layout is None else layout.row_bytes
        self._events: queue.Queue[TransferEvent] = queue.Queue()
        self._untaken: list[TransferEvent] = []
        self.thread = TransferThread(rows, factory, self._events.put, config, layout)
        self.thread.start()

    @property
    def address(self) -> bytes:
        return self.thread.address

    def expect(self, kind: type[E]) -> E:
        """The next event of a kind; others wait for whoever asks for them."""
        for event in self._untaken:
            if isinstance(event, kind):
                self._untaken.remove(event)
                return event
        while True:
            event = self._events.get(timeout=DEADLINE)
            if isinstance(event, kind):
                return event
            assert not isinstance(event, Died), event
            self._untaken.append(event)

    def untaken(self, kind: type[E]) -> list[E]:
        """Events of a kind that have come and were not expected."""
        while not self._events.empty():
            self._untaken.append(self._events.get())
        return [event for event in self._untaken if isinstance(event, kind)]

    def forget(self) -> None:
        """Drop the events that have come."""
        self.untaken(object)
        self._untaken.clear()

    def received(self, grant_id: int, count: int) -> dict[int, int]:
        """Wait for ``count`` positions of a grant: position -> digest."""
        digests: dict[int, int] = {}
        while len(digests) < count:
            event = self.expect(BlocksReceived)
            assert event.grant_id == grant_id
            for position, digest in enumerate(event.digests, start=event.first):
                assert position not in digests
                digests[position] = digest
        return digests


Spawn = Callable[..., Peer]


@contextmanager
def spawner(
    kind: str, network: InProcessNetwork | None = None, cluster_key: bytes | None = None
) -> Iterator[Spawn]:
    """Makes peers of one network, ``at`` an address if given, and stops them at the end.

    Of a ``kind`` that ends in int8, blocks travel quantised; their numbers are such as that keeps.
    """
    kind, quantized, _ = kind.partition(", int8")
    network = network or InProcessNetwork()
    peers: list[Peer] = []

    def spawn(
        num_blocks: int,
        row_bytes: int,
        config: TransferConfig | None = None,
        at: bytes | None = None,
    ) -> Peer:
        generator = torch.Generator().manual_seed(len(peers))
        rows = torch.randint(
            0, 256, (num_blocks, row_bytes), dtype=torch.uint8, generator=generator
        )
        layout = None
        if quantized:
            layout = packed_layout_of(row_bytes)
            rows = whole_numbers(num_blocks, layout, generator)
        if kind in ("memory", "auto"):
            rows = shared_zeros(tuple(rows.shape), rows.dtype).copy_(rows)
        factory: TransportFactory = network.factory(at)
        if kind == "ucx":
            port = int(at.rpartition(b":")[2]) if at else 0
            factory = UCXTransport.factory("127.0.0.1", port, cluster_key)
        elif kind == "memory":
            factory = MemoryTransport.factory(rows, at.removeprefix(SCHEME) if at else None)
        elif kind in ("auto", "auto, private"):
            factory = auto_factory(rows, "127.0.0.1")
        peer = Peer(rows, factory, config or TransferConfig(), layout)
        peers.append(peer)
        return peer

    yield spawn
    for peer in peers:
        peer.thread.stop()
        assert not peer.thread.alive


def packed_layout_of(row_bytes: int) -> PackedLayout:
    """Of bfloat16 rows in small tiles; a test of smaller rows than one tile is skipped."""
    if row_bytes < 128:
        pytest.skip("smaller than a quantised block")
    return PackedLayout(row_bytes // 128, 8, 8, "int8")


def whole_numbers(
    num_blocks: int, layout: PackedLayout, generator: torch.Generator
) -> torch.Tensor:
    """Bfloat16 rows that int8 holds exactly: whole numbers, of which each token's first is 127."""
    rows = torch.randint(-127, 128, (num_blocks, layout.num_elements), generator=generator)
    rows[:, :: layout.head_dim] = 127
    return rows.to(torch.bfloat16)


def transfer(
    sender: Peer, receiver: Peer, grant_id: int, source: Sequence[int], destination: Sequence[int]
) -> list[int]:
    """Grant, send, and check bytes and digests of a whole grant; the digests. It stays open."""
    expected = sender.rows[list(source)].clone()
    receiver.thread.open_grant(grant_id, destination)
    sender.thread.send_blocks(receiver.address, grant_id, 0, source, destination)
    digests = receiver.received(grant_id, len(source))
    sent = sender.expect(BlocksSent)
    assert (sent.grant_id, sent.first) == (grant_id, 0)
    assert sent.digests == [digests[position] for position in range(len(source))]
    assert torch.equal(receiver.rows[list(destination)], expected)
    return sent.digests
