"""Typed messages over ZeroMQ: a ``Server`` many peers talk to, a ``Client`` that talks to one.

Sends never block: a full queue or an unknown peer makes ``send`` return False. What cannot be
decoded is counted and dropped. Between hosts a link is encrypted with CURVE: every process of a
cluster holds the same secret key. A client must know the server's public key to connect; it is
derived from the secret and never sent in clear, so whoever lacks the secret cannot connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
import time
from collections import Counter
from pathlib import Path
from typing import cast

import zmq
import zmq.asyncio

from protocol.errors import ConfigError, ProtocolError
from protocol.messages import Message
from protocol.wire import MAX_FRAME_BYTES, decode, encode

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 10_000  # messages
LINGER_MS = 300
QUIET = 1.0  # seconds between warnings: whoever sends rubbish does not fill the disk


def read_cluster_key(path: Path) -> bytes:
    """The cluster's secret CURVE key (40 characters of Z85). Raises ConfigError."""
    try:
        key = path.read_bytes().strip()
        zmq.curve_public(key)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"the cluster key {path} is readable by others: chmod 600 it")
    except (OSError, ValueError, zmq.ZMQError) as error:
        hint = "make one with `kvferry keygen FILE`"
        raise ConfigError(f"no cluster key in {path}: {error}; {hint}") from error
    return key


def write_cluster_key(path: Path) -> None:
    """Make a new cluster key in a file that only its owner can read. Raises ConfigError."""
    try:
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(zmq.curve_keypair()[1] + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write the cluster key: {error}") from error


class _Link:
    def __init__(self, kind: int, endpoint: str, cluster_key: bytes | None) -> None:
        self.dropped: Counter[str] = Counter()  # messages, by reason
        self._next_warning = 0.0
        self._socket = zmq.asyncio.Context.instance().socket(kind)
        self._socket.set_hwm(HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.IPV6, "[" in endpoint)  # tcp://[::1]:8100
        if cluster_key is not None:
            self._socket.curve_secretkey = cluster_key
            self._socket.curve_publickey = zmq.curve_public(cluster_key)

    def close(self) -> None:
        """Close the socket; what was sent lingers briefly."""
        self._socket.close()

    def _send(self, frames: list[bytes]) -> bool:
        sent = cast("asyncio.Future[object]", self._socket.send_multipart(frames, zmq.NOBLOCK))
        error = sent.exception() if sent.done() else None
        if error is None:
            return True
        self.dropped["unreachable"] += 1
        self._warn("message %s dropped: %s", frames[-2].decode(), error)
        return False

    def _decode(self, frames: list[bytes], peer: str) -> Message | None:
        try:
            return decode(frames)
        except ProtocolError as error:
            self.dropped["malformed"] += 1
            self._warn("message from %s dropped: %s", peer, error)
            return None

    def _warn(self, text: str, *values: object) -> None:
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + QUIET
            log.warning(text, *values)


def _refuse_if_taken(endpoint: str) -> None:
    """Raise ZMQError when a process listens on a Unix socket: binding would take it away."""
    path = endpoint.removeprefix("ipc://")
    if path == endpoint:
        return
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(path)
        raise zmq.ZMQError(zmq.EADDRINUSE, "another process listens there")


class Server(_Link):
    """The bound end. Peers are named by the identity they chose."""

    def __init__(self, endpoint: str, cluster_key: bytes | None = None) -> None:
        super().__init__(zmq.ROUTER, endpoint, cluster_key)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if cluster_key is not None:
            self._socket.curve_server = True
        try:
            _refuse_if_taken(endpoint)
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"cannot listen on {endpoint}: {error}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: bytes, message: Message) -> bool:
        """Queue a message for a peer; False if it is unknown or its queue is full."""
        return self._send([peer, *encode(message)])

    async def receive(self) -> tuple[bytes, Message]:
        """The next well-formed message and who sent it."""
        while True:
            peer, *frames = await self._socket.recv_multipart()
            message = self._decode(frames, peer.decode(errors="replace"))
            if message is not None:
                return peer, message


class Client(_Link):
    """The connecting end; reconnects by itself."""

    def __init__(self, endpoint: str, identity: str, cluster_key: bytes | None = None) -> None:
        super().__init__(zmq.DEALER, endpoint, cluster_key)
        self.endpoint = endpoint
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)  # ms
        self._socket.setsockopt_string(zmq.IDENTITY, identity)
        if cluster_key is not None:
            self._socket.curve_serverkey = zmq.curve_public(cluster_key)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"cannot connect to {endpoint}: {error}") from error

    def send(self, message: Message) -> bool:
        """Queue a message; False if the queue is full."""
        return self._send(encode(message))

    async def receive(self) -> Message:
        """The next well-formed message."""
        while True:
            message = self._decode(await self._socket.recv_multipart(), self.endpoint)
            if message is not None:
                return message
