"""The thread that owns a worker's data plane, and the calls into it.

Owns the transport and everything under way on it. The owner of the arena keeps this bargain:
source blocks do not change until ``BlocksSent`` or ``SendFailed``; destination blocks are not read
before ``BlocksReceived`` nor reused before ``GrantClosed``. On a CUDA arena the caller has waited
for the kernels that wrote the source blocks.

Events come on the transfer thread, in order, by a callback that must return at once.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from kernels.wire_quantization import PackedLayout
from kvtransfer.arena import Arena
from kvtransfer.config import TransferConfig
from kvtransfer.events import Counters, Died, TransferEvent
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transport import AnyTransport, TransportFactory
from kvtransfer.wire import MAX_GRANT_ID, MAX_POSITIONS
from protocol.errors import OverloadedError

MAX_COMMANDS = 1 << 16  # queued calls; more means that the thread is stuck
START_TIMEOUT = 60.0  # seconds; loading a GPU's libraries can take many
STOP_TIMEOUT = 10.0  # seconds
SPINS = 20  # empty rounds before sleeping, while something is under way
NAP = 1.0  # seconds of sleep at most; the stall clocks are looked at this often


class TransferThread:
    """Moves blocks of ``rows [num_blocks, row_elements]`` to and from other workers.

    With a ``layout``, which both ends must have, they travel in 8 bits, except where the peer
    copies them from mapped memory.

    Every method may be called from any thread. After ``Died`` or ``stop``, calls do nothing.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        transport_factory: TransportFactory,
        on_event: Callable[[TransferEvent], None],
        config: TransferConfig | None = None,
        layout: PackedLayout | None = None,
    ) -> None:
        self._arena = Arena(rows, layout)
        self._factory = transport_factory
        self._on_event = on_event
        self._config = config or TransferConfig()
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue(MAX_COMMANDS)
        self._started: Future[AnyTransport] = Future()
        self._stopping = False
        self._round = time.monotonic()  # when the last one began
        self._counters = Counters()
        self._thread = threading.Thread(target=self._main, name="kvferry-transfer", daemon=True)

    def start(self) -> None:
        """Open the transport. Raises what the transport raised (TransportError, ConfigError)."""
        self._thread.start()
        self._transport = self._started.result(START_TIMEOUT)

    @property
    def address(self) -> bytes:
        """What peers give to ``send_blocks`` to reach this worker."""
        return self._transport.address

    @property
    def description(self) -> str:
        """Which library and which kinds of wire are in use."""
        return self._transport.description

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def stuck_for(self) -> float:
        """Seconds since the thread last began a round of its loop, beyond what it may sleep."""
        return max(0.0, time.monotonic() - self._round - NAP)

    def open_grant(self, grant_id: int, blocks: Sequence[int], sender: bytes = b"") -> None:
        """Let position ``i`` of the grant be written into ``blocks[i]``.

        ``grant_id`` is 1 .. 2**32 - 1, hard to guess, and not in use. Grants of one ``sender``,
        under any name, share its part of what may be under way. Raises ValueError.
        """
        if not 0 < grant_id <= MAX_GRANT_ID or len(blocks) > MAX_POSITIONS:
            raise ValueError(f"grant {grant_id} of {len(blocks)} blocks is out of range")
        self._check(blocks)
        owned = list(blocks)
        self._command(lambda: self._receiver.open(grant_id, owned, sender))

    def close_grant(self, grant_id: int) -> None:
        """Write no more under the grant; ``GrantClosed`` says when its blocks are free."""
        self._command(lambda: self._receiver.close(grant_id))

    def send_blocks(
        self,
        peer_address: bytes,
        grant_id: int,
        first: int,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
    ) -> None:
        """Send ``source_blocks`` as positions ``first ..`` of the peer's grant.

        ``destination_blocks`` are the blocks the grant names for them; they decide how messages
        are cut. Ends with one ``BlocksSent`` or ``SendFailed``. Raises ValueError.
        """
        count = len(source_blocks)
        if count == 0 or count != len(destination_blocks):
            raise ValueError(f"{count} blocks cannot go to {len(destination_blocks)}")
        if first < 0 or first + count > MAX_POSITIONS or not 0 < grant_id <= MAX_GRANT_ID:
            raise ValueError(f"position {first} of grant {grant_id} is out of range")
        self._check(source_blocks)
        source, destination = list(source_blocks), list(destination_blocks)
        self._command(lambda: self._sender.send(peer_address, grant_id, first, source, destination))

    def disconnect(self, peer_address: bytes) -> None:
        """Give up the connection to a peer; everything being sent to it fails."""
        self._command(lambda: self._sender.disconnect(peer_address, "disconnected"))

    def snapshot(self) -> Counters:
        """The counters as they are now."""
        now = self._counters
        return replace(
            now,
            refused=dict(now.refused),
            connections=dict(now.connections),
            strangers=self._transport.num_strangers,
        )

    def stop(self) -> None:
        """End the thread and close the transport. No event comes after. Idempotent.

        Blocks reported as sent may still be on their way, and are lost: only the peer knows what
        it has.
        """
        self._stopping = True
        if self._started.done() and not self._started.exception():
            self._started.result().wake()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT)

    # On the transfer thread ------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with _device(self._arena.rows.device):
                transport = self._factory()
                try:
                    self._build(transport)
                    self._started.set_result(transport)
                    self._serve(transport)
                finally:
                    transport.shutdown()
        except Exception as error:  # noqa: BLE001 - the end of a thread: nothing is above it
            reason = f"{type(error).__name__}: {error}"
            if self._started.done():
                self._on_event(Died(reason))
            else:
                self._started.set_exception(error)

    def _build(self, transport: AnyTransport) -> None:
        shared = (self._arena, transport, self._config, self._counters, self._on_event)
        self._sender, self._receiver = Sender(*shared), Receiver(*shared, self._run_commands)

    def _serve(self, transport: AnyTransport) -> None:
        idle = 0
        while not self._stopping:
            self._round = time.monotonic()
            moved = self._run_commands()
            moved |= transport.progress()
            moved |= self._sender.step()
            moved |= self._receiver.step()
            idle = 0 if moved else idle + 1
            if idle > (SPINS if self._sender.busy or self._receiver.busy else 0):
                transport.wait(NAP)

    def _run_commands(self) -> bool:
        ran = False
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
                ran = True
        return ran

    # On the caller's thread ------------------------------------------------------------------

    def _command(self, command: Callable[[], None]) -> None:
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            raise OverloadedError("the transfer thread does not keep up") from None
        self._transport.wake()

    def _check(self, blocks: Sequence[int]) -> None:
        if blocks and not (min(blocks) >= 0 and max(blocks) < self._arena.num_blocks):
            raise ValueError(f"blocks {min(blocks)} .. {max(blocks)} of {self._arena.num_blocks}")


@contextlib.contextmanager
def _device(device: torch.device) -> Iterator[None]:
    """On a GPU, an own stream: copies and digests do not queue behind the engine's kernels."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
