"""UCX as a transport, through the synchronous layer of ucxx and without its threads.

Peers find each other by host and port: a listener takes connections, and each connection is one
UCX endpoint **with peer error handling**, at both ends. That is what makes a receive from a killed
process end with a reset connection instead of never, and it keeps UCX from reading a dead
process's memory (CMA), which would abort the survivor. UCX still chooses the wire by itself: RDMA
or CUDA IPC where the two ends have it, else TCP over all interfaces.

With a cluster key, whoever is at the other end of a connection must prove that it holds the key
before a block is sent, in either direction; who does not is hung up on and counted. UCX names no
endpoint with a tagged message, so what a stranger sends before it is hung up on is held off by the
grants alone: their ids are random, and told to proven peers only. UCX cannot bind its listener to
one address: without a key, an end on the loopback address takes connections of this host only.

Every message above ``RNDV_THRESH`` is offered first and moves once the receiver has taken it
(rendezvous), and below it is a single fragment. A message of several eager fragments would be left
hanging for ever by a sender that dies between two of them; so this one setting is not the user's.
Every other ``UCX_*`` variable of the environment wins over ``DEFAULTS``.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import socket
from collections.abc import Callable

os.environ.setdefault(
    "UCX_WARN_UNUSED_ENV_VARS", "n"
)  # ucxx sets variables that a CPU has no use for

import ucxx._lib.libucxx as ucxx

from kvtransfer.transport import Buffer, Message, TransportError
from kvtransfer.ucx_info import available, check_transport, describe, peer_host
from kvtransfer.ucx_peers import Peer, Request, answer, dial, from_this_host
from kvtransfer.wakeup import WakeUp

__all__ = ["UCXTransport", "check_transport"]

log = logging.getLogger(__name__)

DEFAULTS = {
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "1m",  # so that one read takes in up to four segments
    "TCP_CM_REUSEADDR": "y",  # a restarted worker takes its port again at once
}
FORCED = {"RNDV_THRESH": "8192"}
MAX_ROUNDS = 16  # of progress at once, so that arrivals are looked at in between
CLOSE_PERIOD = 10_000_000  # nanoseconds that closing an endpoint waits at a time
CLOSE_ATTEMPTS = 100
MAX_PROVING = 64  # peers that reach us and have not proven themselves yet
SEPARATOR = b";"  # in an address; what follows is another transport's

_ANY = ucxx.UCXXTag(0)
_NO_BITS = ucxx.UCXXTagMask(0)


class UCXTransport:
    """One UCX worker with a listener. Raises TransportError when UCX cannot start."""

    def __init__(self, host: str, port: int = 0, cluster_key: bytes | None = None) -> None:
        """``host`` is where peers find this machine; port 0 takes any free one."""
        options = {k: v for k, v in DEFAULTS.items() if f"UCX_{k}" not in os.environ} | FORCED
        self._cluster_key = cluster_key
        self._this_host_only = cluster_key is None and _is_loopback(host)
        self._incoming: list[Peer] = []
        self._outgoing: list[Peer] = []
        self._requests: list[Request] = []
        self.num_strangers = 0
        try:
            features = (ucxx.Feature.TAG, ucxx.Feature.STREAM, ucxx.Feature.WAKEUP)
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
    def factory(
        cls, host: str, port: int = 0, cluster_key: bytes | None = None
    ) -> Callable[[], UCXTransport]:
        """What a TransferThread calls, on its own thread."""
        return lambda: cls(host, port, cluster_key)

    def watch(self, descriptor: int) -> None:
        """Let ``wait`` also end when a descriptor is readable."""
        self._poll.register(descriptor, select.POLLIN)

    def connect(self, address: bytes) -> Peer:
        """See Transport."""
        dialled = address.partition(SEPARATOR)[0]
        host, _, port = dialled.decode(errors="replace").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise TransportError(f"not an address of a UCX peer: {address!r}")
        try:
            endpoint = ucxx.UCXEndpoint.create(self._worker, host, int(port), True)
        except ucxx.UCXError as error:
            raise TransportError(f"cannot reach {host}:{port}: {error}") from error
        key = self._cluster_key
        handshake = None if key is None else dial(endpoint, key, dialled)
        self._outgoing.append(connection := Peer(endpoint, handshake))
        return connection

    def send(self, connection: Peer, tag: int, buffer: Buffer) -> Request:
        """See Transport."""
        if not connection.alive:
            raise TransportError(connection.failure or "the connection is lost")
        return self._track(connection.send(tag, buffer))

    def probe(self) -> Message | None:
        """See Transport."""
        found = self._worker.tag_probe(_ANY, _NO_BITS, True)
        if not found.matched:
            return None
        return Message(found.sender_tag.value, found.length, found)

    def receive(self, message: Message, buffer: Buffer) -> Request:
        """See Transport."""
        request = Request(buffer)
        begun = self._worker.tag_recv_with_handle(request.array, message.handle)
        return self._track(request.begin(begun))

    def progress(self) -> bool:
        """See Transport."""
        rounds = 0
        while rounds < MAX_ROUNDS and self._worker.progress_once():
            rounds += 1
        moved = self._prove()
        before = len(self._requests)
        self._requests = [request for request in self._requests if not request.poll()]
        return rounds > 0 or moved or len(self._requests) != before

    def _prove(self) -> bool:
        """Go on with the hand-shakes; whether one is over."""
        proving = [peer for peer in self._incoming if peer.proving]
        for peer in proving[:-MAX_PROVING]:
            peer.fail("too many peers at once that have not proven themselves")
        proving += [peer for peer in self._outgoing if peer.proving]
        over = [peer for peer in proving if peer.failure is not None or peer.prove()]
        for peer in over:
            if peer.failure is not None:
                self.num_strangers += peer in self._incoming
                log.warning("hung up on a peer of the data plane: %s", peer.failure)
                _close(peer)
        return bool(over)

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

    def close(self, connection: Peer) -> None:
        """See Transport."""
        self._outgoing.remove(connection)
        _close(connection)

    def close_incoming(self) -> None:
        """See Transport."""
        for peer in self._incoming:
            _close(peer)
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
        self._incoming = [peer for peer in self._incoming if peer.alive]
        endpoint = self._listener.create_endpoint_from_conn_request(request, True)
        key, handshake = self._cluster_key, None
        if key is not None:
            handshake = answer(endpoint, key, self.address)
        elif self._this_host_only:
            handshake = from_this_host(peer_host(request, self._listener.port))
        self._incoming.append(Peer(endpoint, handshake))

    def _track(self, request: Request) -> Request:
        if not request.poll():
            self._requests.append(request)
        return request


def _close(peer: Peer) -> None:
    peer.fail("connection closed")
    peer.endpoint.close_blocking(CLOSE_PERIOD, CLOSE_ATTEMPTS)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
