"""UCX as a transport, through the synchronous layer of ucxx and without its threads.

Peers find each other by host and port: a listener takes connections, and each connection is one
UCX endpoint **with peer error handling**, at both ends. That is what makes a receive from a killed
process end with a reset connection instead of never, and it keeps UCX from reading a dead
process's memory (CMA), which would abort the survivor. UCX still chooses the wire by itself: RDMA
or CUDA IPC where the two ends have it, else TCP over all interfaces.

Every message above ``RNDV_THRESH`` is offered first and moves once the receiver has taken it
(rendezvous), and below it is a single fragment. A message of several eager fragments would be left
hanging for ever by a sender that dies between two of them; so this one setting is not the user's.
Every other ``UCX_*`` variable of the environment wins over ``DEFAULTS``.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "UCX_WARN_UNUSED_ENV_VARS", "n"
)  # ucxx sets variables that a CPU has no use for

import ucxx._lib.libucxx as ucxx
from ucxx._lib.arr import Array

from kvtransfer.transport import Buffer, Message, TransportError
from kvtransfer.ucx_info import available, check_transport, describe, endpoint_lanes
from kvtransfer.wakeup import WakeUp

__all__ = ["UCXTransport", "check_transport"]

DEFAULTS = {
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "256k",
    "TCP_CM_REUSEADDR": "y",  # a restarted worker takes its port again at once
}
FORCED = {"RNDV_THRESH": "8192"}
MAX_ROUNDS = 16  # of progress at once, so that arrivals are looked at in between
CLOSE_PERIOD = 10_000_000  # nanoseconds that closing an endpoint waits at a time
CLOSE_ATTEMPTS = 100
SEPARATOR = b";"  # in an address; what follows is another transport's

_ANY = ucxx.UCXXTag(0)
_NO_BITS = ucxx.UCXXTagMask(0)


class _Request:
    """An Operation: a UCX request, and the buffer kept alive until it ends."""

    __slots__ = ("_buffer", "_request", "done", "error")
    digests = None

    def __init__(self, request: Any, buffer: Buffer) -> None:
        self._request = request
        self._buffer = buffer
        self.done = False
        self.error: str | None = None

    def poll(self) -> bool:
        """Look once; whether it has ended now."""
        if not self._request.completed:
            return False
        try:
            self._request.check_error()
        except ucxx.UCXError as error:
            self.error = str(error) or type(error).__name__
        self.done = True
        self._request = self._buffer = None
        return True


class _Endpoint:
    """A Connection."""

    __slots__ = ("_lanes", "endpoint")
    in_place = False

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self._lanes = ""

    @property
    def description(self) -> str:
        """The wires UCX picked, once the two ends have agreed."""
        if not self._lanes and self.endpoint.alive:
            self._lanes = endpoint_lanes(self.endpoint.handle)
        return self._lanes


class UCXTransport:
    """One UCX worker with a listener. Raises TransportError when UCX cannot start."""

    def __init__(self, host: str, port: int = 0) -> None:
        """``host`` is where peers find this machine; port 0 takes any free one."""
        options = {k: v for k, v in DEFAULTS.items() if f"UCX_{k}" not in os.environ} | FORCED
        self._incoming: list[Any] = []
        self._outgoing: list[_Endpoint] = []
        self._requests: list[_Request] = []
        try:
            features = (ucxx.Feature.TAG, ucxx.Feature.WAKEUP)
            self._context = ucxx.UCXContext(options, features)
            self._worker = ucxx.UCXWorker(self._context)
            self._worker.init_blocking_progress_mode()
            self._listener = ucxx.UCXListener.create(self._worker, port, self._take_connection)
        except ucxx.UCXError as error:
            raise TransportError(f"UCX cannot start on {host}:{port}: {error}") from error
        self._wake = WakeUp()
        self._poll = select.poll()
        self._poll.register(self._worker.epoll_file_descriptor, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self.address = f"{host}:{self._listener.port}".encode()
        self.description = describe(ucxx.get_ucx_version(), available(self._context.info))

    @classmethod
    def factory(cls, host: str, port: int = 0) -> Callable[[], UCXTransport]:
        """What a TransferThread calls, on its own thread."""
        return lambda: cls(host, port)

    def watch(self, descriptor: int) -> None:
        """Let ``wait`` also end when a descriptor is readable."""
        self._poll.register(descriptor, select.POLLIN)

    def connect(self, address: bytes) -> _Endpoint:
        """See Transport."""
        mine = address.partition(SEPARATOR)[0]
        host, _, port = mine.decode(errors="replace").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise TransportError(f"not an address of a UCX peer: {address!r}")
        try:
            endpoint = ucxx.UCXEndpoint.create(self._worker, host, int(port), True)
        except ucxx.UCXError as error:
            raise TransportError(f"cannot reach {host}:{port}: {error}") from error
        self._outgoing.append(connection := _Endpoint(endpoint))
        return connection

    def send(self, connection: _Endpoint, tag: int, buffer: Buffer) -> _Request:
        """See Transport."""
        if not connection.endpoint.alive:
            raise TransportError("the connection is lost")
        array = Array(buffer)
        return self._track(connection.endpoint.tag_send(array, ucxx.UCXXTag(tag)), array)

    def probe(self) -> Message | None:
        """See Transport."""
        found = self._worker.tag_probe(_ANY, _NO_BITS, True)
        if not found.matched:
            return None
        return Message(found.sender_tag.value, found.length, found)

    def receive(self, message: Message, buffer: Buffer) -> _Request:
        """See Transport."""
        array = Array(buffer)
        return self._track(self._worker.tag_recv_with_handle(array, message.handle), array)

    def progress(self) -> bool:
        """See Transport."""
        rounds = 0
        while rounds < MAX_ROUNDS and self._worker.progress_once():
            rounds += 1
        before = len(self._requests)
        self._requests = [request for request in self._requests if not request.poll()]
        return rounds > 0 or len(self._requests) != before

    def wait(self, timeout: float) -> None:
        """See Transport."""
        if not self._worker.arm():
            return
        for descriptor, _ in self._poll.poll(timeout * 1000):
            if descriptor == self._wake.fileno():
                self._wake.clear()

    def wake(self) -> None:
        """See Transport."""
        self._wake.ring()

    def close(self, connection: _Endpoint) -> None:
        """See Transport."""
        self._outgoing.remove(connection)
        connection.endpoint.close_blocking(CLOSE_PERIOD, CLOSE_ATTEMPTS)

    def close_incoming(self) -> None:
        """See Transport."""
        for endpoint in self._incoming:
            endpoint.close_blocking(CLOSE_PERIOD, CLOSE_ATTEMPTS)
        self._incoming.clear()

    def shutdown(self) -> None:
        """Endpoints first, then the listener, the worker and the context, as UCX demands."""
        for connection in list(self._outgoing):
            self.close(connection)
        self.close_incoming()
        self._listener = None
        self._worker.cancel_inflight_requests(CLOSE_PERIOD, CLOSE_ATTEMPTS)
        self.progress()
        self._requests.clear()
        self._worker = None
        self._context = None
        self._wake.close()

    def _take_connection(self, request: int) -> None:
        """Called by UCX, inside ``progress``."""
        self._incoming = [endpoint for endpoint in self._incoming if endpoint.alive]
        self._incoming.append(self._listener.create_endpoint_from_conn_request(request, True))

    def _track(self, ucx_request: Any, buffer: Buffer) -> _Request:
        request = _Request(ucx_request, buffer)
        if not request.poll():
            self._requests.append(request)
        return request
