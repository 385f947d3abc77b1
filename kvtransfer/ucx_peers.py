"""UCX endpoints and what is under way on them; the proofs that precede everything else.

With a cluster key an endpoint carries no block before its peer has proven itself over the
endpoint's stream (see ``proof``). A handshake is a generator: it yields the stream's requests one
by one and ends, or raises NotProvenError.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import ucxx._lib.libucxx as ucxx
from ucxx._lib.arr import Array

from kvtransfer import proof
from kvtransfer.transport import Buffer
from kvtransfer.ucx_info import endpoint_lanes, is_loopback

HANDSHAKE_TIMEOUT = 5.0  # seconds


class Request:
    """An Operation: a UCX request once it has begun, and the buffer kept alive until it ends."""

    __slots__ = ("_request", "array", "done", "error")
    digests = None

    def __init__(self, buffer: Buffer) -> None:
        self.array = Array(buffer)
        self._request: Any = None
        self.done = False
        self.error: str | None = None

    def begin(self, request: Any) -> Request:
        """The bytes are on their way."""
        self._request = request
        return self

    def poll(self) -> bool:
        """Look once; whether it has ended."""
        if self.done or self._request is None or not self._request.completed:
            return self.done
        error = None
        try:
            self._request.check_error()
        except ucxx.UCXError as caught:
            error = str(caught) or type(caught).__name__
        self.end(error)
        return True

    def end(self, error: str | None) -> None:
        """Once only."""
        self.error, self.done = error, True
        self._request = self.array = None


Handshake = Iterator[Request]


def dial(endpoint: Any, cluster_key: bytes, address: bytes) -> Handshake:
    """Prove ourselves to who listens at ``address``, and have it prove itself."""
    connector = proof.Connector(cluster_key, address)
    yield _send(endpoint, connector.hello)
    answer = np.empty(proof.ANSWER_BYTES, np.uint8)
    yield _receive(endpoint, answer)
    yield _send(endpoint, connector.prove(answer.tobytes()))


def answer(endpoint: Any, cluster_key: bytes, address: bytes) -> Handshake:
    """Have a peer that reached ``address`` prove itself, and do as much for it."""
    hello = np.empty(proof.HELLO_BYTES, np.uint8)
    yield _receive(endpoint, hello)
    listener = proof.Listener(cluster_key, address, hello.tobytes())
    yield _send(endpoint, listener.answer)
    proven = np.empty(proof.PROOF_BYTES, np.uint8)
    yield _receive(endpoint, proven)
    listener.check(proven.tobytes())


def from_this_host(host: str) -> Handshake:
    """Without a key: see that a peer that connects from ``host`` is on this one."""
    if not is_loopback(host):
        raise proof.NotProvenError(f"{host} is another host, and there is no cluster key")
    yield from ()


class Peer:
    """A Connection, or a peer that reached us: one endpoint."""

    in_place = False

    def __init__(self, endpoint: Any, handshake: Handshake | None = None) -> None:
        self.endpoint = endpoint
        self.failure: str | None = None  # set once: nothing goes this way any more
        self._handshake = handshake
        self._step: Request | None = None  # of the handshake
        self._deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        self._held: deque[tuple[Request, int]] = deque()  # with their tags
        self._lanes = ""

    @property
    def description(self) -> str:
        """The wires UCX picked, once the two ends have agreed."""
        if not self._lanes and self.endpoint.alive:
            self._lanes = endpoint_lanes(self.endpoint.handle)
        return self._lanes

    @property
    def alive(self) -> bool:
        """Whether anything can go this way."""
        return self.failure is None and self.endpoint.alive

    @property
    def proving(self) -> bool:
        """Whether the handshake is under way."""
        return self._handshake is not None and self.failure is None

    def send(self, tag: int, buffer: Buffer) -> Request:
        """Send, after the handshake and in order."""
        request = Request(buffer)
        if self.proving:
            self._held.append((request, tag))
        else:
            self._begin(request, tag)
        return request

    def prove(self) -> bool:
        """Go on with the handshake; whether it is over now. Then there is a ``failure``, or not."""
        try:
            while self._step is None or self._step.poll():
                if self._step is not None and self._step.error is not None:
                    self.fail(f"lost in the hand-shake: {self._step.error}")
                    return True
                assert self._handshake is not None
                self._step = next(self._handshake)
        except StopIteration:
            self._handshake = None
            while self._held:
                self._begin(*self._held.popleft())
            return True
        except (proof.NotProvenError, ucxx.UCXError) as error:
            self.fail(str(error))
            return True
        if time.monotonic() > self._deadline:
            self.fail(f"the peer did not prove itself within {HANDSHAKE_TIMEOUT:g} s")
            return True
        return False

    def fail(self, reason: str) -> None:
        """Let nothing more go this way; what was held back ends. Idempotent."""
        self.failure = self.failure or reason
        for request, _ in self._held:
            request.end(self.failure)
        self._held.clear()

    def _begin(self, request: Request, tag: int) -> None:
        request.begin(self.endpoint.tag_send(request.array, ucxx.UCXXTag(tag)))


def _send(endpoint: Any, frame: bytes) -> Request:
    request = Request(np.frombuffer(frame, np.uint8))
    return request.begin(endpoint.stream_send(request.array))


def _receive(endpoint: Any, buffer: Buffer) -> Request:
    request = Request(buffer)
    return request.begin(endpoint.stream_recv(request.array))
