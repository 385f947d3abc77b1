"""One simulated worker's data plane: the real sender and receiver over a faulty transport.

Calls into it wait, as those of a transfer thread do, until it takes a round of its loop; what it
reports goes through a channel to the worker. Whatever writes to the worker's memory here is held
to the grants that are open.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from kvtransfer.arena import Arena
from kvtransfer.config import TransferConfig
from kvtransfer.events import Counters, GrantClosed, TransferEvent
from kvtransfer.inproc import InProcessNetwork
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from tests.fake_model import Memory
from tests.handoff_simulation.faulty_transport import FaultyTransport
from tests.handoff_simulation.network import Network


class DataPlane:
    """``report`` takes what reaches the worker; ``in_use()`` are its sequences' blocks."""

    def __init__(
        self,
        network: Network,
        ends: InProcessNetwork,
        address: bytes,
        memory: Memory,
        config: TransferConfig,
        report: Callable[[TransferEvent], None],
        in_use: Callable[[], list[list[int]]],
    ) -> None:
        self.address = address
        self.counters = Counters()
        self.transport = FaultyTransport(ends, address, network.random)
        self.receives: dict[int, list[int]] = {}  # grant id to blocks that may be written
        self._network = network
        self._memory = memory
        self._report = report
        self._in_use = in_use
        self._calls: deque[Callable[[], None]] = deque()
        self._moved = False  # in the last round: then another follows
        arena = Arena(torch.from_numpy(memory.rows))
        shared = (arena, self.transport, config, self.counters, self._post)
        self._sender = Sender(*shared, clock=lambda: network.now)
        self._receiver = Receiver(*shared, self._catch_up, clock=lambda: network.now)

    def open_grant(self, grant_id: int, blocks: Sequence[int]) -> None:
        """See TransferThread."""
        self._call(partial(self._open, grant_id, list(blocks)))

    def close_grant(self, grant_id: int) -> None:
        """See TransferThread."""
        self._call(partial(self._receiver.close, grant_id))

    def send_blocks(
        self,
        peer_address: bytes,
        grant_id: int,
        first: int,
        source: Sequence[int],
        destination: Sequence[int],
    ) -> None:
        """See TransferThread."""
        arguments = (peer_address, grant_id, first, list(source), list(destination))
        self._call(partial(self._sender.send, *arguments))

    def nap_ends(self) -> None:
        """The thread wakes up by itself, to look at its clocks."""
        self.transport.wake()

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way."""
        return self.transport.quiet and self._asleep and not self.receives

    def reading(self) -> set[int]:
        """Blocks that messages are sent from; those in a staging slot have been copied."""
        rows = self._memory.rows
        start, row_bytes = rows.ctypes.data, rows.strides[0]
        blocks: set[int] = set()
        for buffer in self.transport.reading():
            first = (buffer.ctypes.data - start) // row_bytes
            blocks.update(range(first, first + len(buffer) // row_bytes))
        return blocks & set(range(len(rows)))

    def events(self) -> list[Callable[[], None]]:
        """What can happen next."""
        events = self.transport.events()
        if not self._asleep:
            events.append(self._round)
        return [partial(self._watch, event) for event in events]

    def faults(self) -> list[Callable[[], None]]:
        """What can go wrong next."""
        return [partial(self._break, fault) for fault in self.transport.faults()]

    @property
    def _asleep(self) -> bool:
        return self.transport.asleep and not self._moved

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self.transport.wake()

    def _open(self, grant_id: int, blocks: list[int]) -> None:
        self.receives[grant_id] = blocks
        self._receiver.open(grant_id, blocks, b"")

    def _round(self) -> None:
        """Once around the loop of a transfer thread."""
        if not self._moved:
            self.transport.wait(0.0)
        self._moved = self._catch_up()
        self._moved |= self._sender.step()
        self._moved |= self._receiver.step()
        self._moved |= self.transport.progress()

    def _catch_up(self) -> bool:
        caught = bool(self._calls)
        while self._calls:
            self._calls.popleft()()
        return caught

    def _post(self, event: TransferEvent) -> None:
        if isinstance(event, GrantClosed):
            del self.receives[event.grant_id]
        self._network.post(f"transfer>{self.address.decode()}", lambda: self._report(event))

    def _break(self, fault: Callable[[], None]) -> None:
        self._network.lost = True  # an eager message may have been on the way
        self._watch(fault)

    def _watch(self, event: Callable[[], None]) -> None:
        """Let something happen; what it writes to must be granted and no sequence's."""
        before, granted = self._memory.rows.copy(), self._granted()
        event()
        changed = set(np.flatnonzero((self._memory.rows != before).any(axis=1)).tolist())
        assert changed <= granted | self._granted(), f"{changed} written without a grant"
        assert changed.isdisjoint(itertools.chain(*self._in_use())), f"{changed} are in use"

    def _granted(self) -> set[int]:
        return set(itertools.chain(*self.receives.values()))
