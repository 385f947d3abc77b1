"""What the two ends of a memory connection say over their socket, written, read and checked.

    sender -> receiver   hello    magic, row bytes (64 bits), blocks (64), with the arena's file
    sender -> receiver   offer    number (64), tag (64), block ids (32 each)
    receiver -> sender   ack      number (64)

A frame is one packet. Reading raises BlockingIOError while there is none, another OSError when the
peer is lost, and ValueError for what a peer of ours would not say.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.shared_memory import map_shared
from kvtransfer.wire import MAX_COUNT

_MAGIC = b"kvferry1"
_HELLO = struct.Struct("=8sQQ")
_OFFER = struct.Struct("=QQ")
_ACK = struct.Struct("=Q")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group
_ID = np.dtype(np.uint32)
_MAX_OFFER = _OFFER.size + MAX_COUNT * _ID.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A message: blocks of the peer that may be copied until the socket is closed."""

    number: int
    tag: int
    source: NDArray[np.uint8]  # [num_blocks, row_bytes], the peer's arena, read-only
    block_ids: list[int]

    @property
    def num_bytes(self) -> int:
        """What the blocks hold together."""
        return len(self.block_ids) * len(self.source[0])


def packet_socket() -> socket.socket:
    """An end that keeps packets whole and never blocks."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


def is_same_user(peer: socket.socket) -> bool:
    """Whether the process at the other end runs as the user of this one."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user == os.geteuid()


def send_hello(peer: socket.socket, row_bytes: int, num_blocks: int, file: int) -> None:
    """Show the peer our arena. Raises OSError."""
    socket.send_fds(peer, [_HELLO.pack(_MAGIC, row_bytes, num_blocks)], [file])


def read_hello(peer: socket.socket) -> NDArray[np.uint8]:
    """The peer's arena [num_blocks, row_bytes], mapped for reading."""
    frame, files, _, _ = socket.recv_fds(peer, _HELLO.size + 1, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if len(frame) != _HELLO.size or len(files) != 1:
            raise ValueError("not a hello")
        magic, row_bytes, num_blocks = _HELLO.unpack(frame)
        if magic != _MAGIC:
            raise ValueError("a hello of another version")
        memory = map_shared(files[0], row_bytes * num_blocks)
    finally:
        for file in files:
            os.close(file)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, row_bytes)


def pack_offer(number: int, tag: int, block_ids: Sequence[int]) -> bytes:
    """The frame of an offer of at most ``MAX_COUNT`` blocks."""
    return _OFFER.pack(number, tag) + np.asarray(block_ids, _ID).tobytes()


def read_offer(peer: socket.socket, source: NDArray[np.uint8]) -> Offer:
    """The next offer of a peer whose arena is ``source``."""
    frame = peer.recv(_MAX_OFFER + 1)
    if not frame:
        raise ConnectionResetError("connection closed by the peer")
    if len(frame) > _MAX_OFFER or len(frame) < _OFFER.size + _ID.itemsize:
        raise ValueError("not an offer")
    number, tag = _OFFER.unpack_from(frame)
    block_ids = np.frombuffer(frame, _ID, offset=_OFFER.size)  # raises ValueError for odd ends
    if int(block_ids.max()) >= len(source):
        raise ValueError("an offer of blocks that the peer does not have")
    return Offer(number, tag, source, block_ids.tolist())


def send_ack(peer: socket.socket, number: int) -> None:
    """Say that an offer has been taken. Raises OSError when the peer has closed the socket."""
    peer.send(_ACK.pack(number))


def read_ack(peer: socket.socket) -> int:
    """The number of an offer that has been taken."""
    frame = peer.recv(_ACK.size + 1)
    if not frame:
        raise ConnectionResetError("connection closed by the peer")
    if len(frame) != _ACK.size:
        raise ValueError("not an ack")
    number: int = _ACK.unpack(frame)[0]
    return number
