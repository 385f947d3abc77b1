"""Malformed frames on every socket: nothing crashes, nothing grows, and others are served.

``KVFERRY_FUZZ_FRAMES`` is how many frames each test tries; a million takes some minutes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
import torch
import zmq
import zmq.asyncio

from kernels.shared_memory import shared_file, shared_zeros
from kvtransfer.events import BlocksReceived, MessageRefused
from kvtransfer.memory import SCHEME, MemoryTransport
from kvtransfer.memory_frames import pack_offer, packet_socket, read_ack, send_hello
from kvtransfer.proof import Connector, Listener, NotProvenError
from kvtransfer.ucx import UCXTransport
from protocol.errors import ProtocolError
from protocol.link import Client, Server
from protocol.messages import Grant, Handoff, RegisterAgain, RegistrationRefused, Revoke
from protocol.wire import decode, encode
from tests.kvtransfer.peers import spawner, transfer

FRAMES = int(os.environ.get("KVFERRY_FUZZ_FRAMES", "20000"))
GROWTH = 64 << 20  # bytes; far less than a leak of every frame, far more than noise
BLOCKS, ROW = 8, 512
MESSAGES = [
    encode(message)
    for message in (
        Grant(
            request_id="r",
            grant_id=1,
            epoch=1,
            num_cached_tokens=0,
            blocks=[1, 2],
            expires_in=1.0,
        ),
        Handoff(request_id="r", grant_id=1, epoch=1, first_token=1, num_tokens=8, digests=[1, 2]),
        Revoke(request_id="r"),
        RegisterAgain(),
    )
]


def damaged(random: Random, frame: bytes) -> bytes:
    """A frame with some of it changed, cut off, put in or doubled; at times pure noise."""
    changed = bytearray(frame)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = random.randbytes(random.choice((1, 8, 64)))
            case 3:
                changed += changed[at:]
            case _:
                changed[at : at + 8] = random.choice((b"\xff", b"\0")) * 8
    return random.randbytes(random.randrange(100)) if random.random() < 0.1 else bytes(changed)


@pytest.fixture
def flat() -> Iterator[None]:
    """Neither memory nor descriptors are left behind."""
    process = psutil.Process()
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    yield
    gc.collect()
    assert process.memory_info().rss - memory < GROWTH
    assert process.num_fds() <= files + 8


def test_control_frames() -> None:
    random = Random(0)
    for _ in range(FRAMES):
        kind, payload = random.choice(MESSAGES)
        frames = [damaged(random, kind) if random.random() < 0.1 else kind, payload]
        frames[1] = damaged(random, payload)
        with contextlib.suppress(ProtocolError):
            decode(frames)


@pytest.mark.filterwarnings("ignore:Unclosed")
async def test_a_bound_control_socket(
    flat: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")  # a line for each frame otherwise
    random, server = Random(1), Server(f"ipc://{tmp_path}/s")
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(server.endpoint)
        for number in range(FRAMES // 100):
            for _ in range(99):
                noise = [damaged(random, frame) for frame in random.choice(MESSAGES)]
                stranger.send_multipart(noise * random.choice((1, 1, 3)))
            last = RegistrationRefused(reason=f"end of round {number}")
            stranger.send_multipart(encode(last))
            while (await server.receive())[1] != last:
                pass  # noise that happens to be a message
    assert server.dropped["malformed"] > FRAMES // 2
    assert server.dropped.keys() == {"malformed"}
    server.close()


@pytest.mark.filterwarnings("ignore:Unclosed")
async def test_a_connecting_control_socket(
    flat: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    random, endpoint = Random(2), f"ipc://{tmp_path}/s"
    context = zmq.asyncio.Context()
    stranger = context.socket(zmq.ROUTER)
    stranger.bind(endpoint)
    client = Client(endpoint, "worker")
    client.send(RegisterAgain())
    identity, *_ = await stranger.recv_multipart()
    for number in range(FRAMES // 100):
        for _ in range(99):
            noise = [damaged(random, frame) for frame in random.choice(MESSAGES)]
            await stranger.send_multipart([identity, *noise])
        last = RegistrationRefused(reason=f"end of round {number}")
        await stranger.send_multipart([identity, *encode(last)])
        while await client.receive() != last:
            pass
    assert client.dropped["malformed"] > FRAMES // 2
    client.close()
    stranger.close(0)
    context.term()


def test_frames_of_the_hand_shake() -> None:
    random, key = Random(3), b"k" * 40
    for _ in range(FRAMES):
        connector = Connector(key, b"h:1")
        with contextlib.suppress(NotProvenError):
            listener = Listener(key, b"h:1", damaged(random, connector.hello))
            with pytest.raises(NotProvenError):
                connector.prove(random.randbytes(len(listener.answer)))
            with pytest.raises(NotProvenError):
                listener.check(damaged(random, listener.answer))


def test_tagged_messages(flat: None) -> None:
    """Any tag, any length, straight at a receiver with a grant open."""
    random = Random(4)
    with spawner("ucx") as spawn:
        receiver = spawn(BLOCKS, ROW)
        receiver.thread.open_grant(7, [3])
        before = receiver.rows.clone()
        stranger = UCXTransport("127.0.0.1")
        connection, noise = stranger.connect(receiver.address), np.zeros(2 * ROW, np.uint8)
        for _ in range(FRAMES // 200):
            tags = [random.choice((7 << 32 | 2, random.getrandbits(64))) for _ in range(100)]
            lengths = [random.choice((0, 1, ROW - 1, ROW + 1, 2 * ROW)) for _ in tags]
            sent = [
                stranger.send(connection, tag, noise[:length])
                for tag, length in zip(tags, lengths, strict=True)
            ]
            while not all(operation.done for operation in sent):
                stranger.progress()
            for _ in sent:
                receiver.expect(MessageRefused)
        assert not receiver.untaken(BlocksReceived)
        assert torch.equal(receiver.rows, before)
        stranger.shutdown()
        transfer(spawn(BLOCKS, ROW), receiver, 8, [1, 2], [4, 5])


class _MemoryEnd:
    """A mapped-memory transport, and strangers of the same user who talk to it."""

    def __init__(self) -> None:
        self.rows = shared_zeros((BLOCKS, ROW), torch.uint8)
        self.transport = MemoryTransport(self.rows)
        self._name = b"\0" + self.transport.address.removeprefix(SCHEME)

    def stranger(self) -> socket.socket:
        peer = packet_socket()
        peer.connect(self._name)
        file = shared_file(self.rows)
        assert file is not None
        send_hello(peer, ROW, BLOCKS, file)
        return peer


def test_offers_of_mapped_memory(flat: None) -> None:
    random, end = Random(5), _MemoryEnd()
    stranger = end.stranger()
    for number in range(FRAMES):
        frame = pack_offer(number, random.getrandbits(64), [random.randrange(BLOCKS)])
        try:
            stranger.send(damaged(random, frame))
        except OSError:  # hung up on, or left unread
            stranger.close()
            stranger = end.stranger()
        end.transport.progress()
        while (message := end.transport.probe()) is not None:  # it happens to be an offer
            end.transport.receive(message, np.empty(0, np.uint8))
    assert end.transport.num_strangers > FRAMES // 10
    assert not end.rows.any()
    stranger.close()
    end.transport.shutdown()


def test_acks_of_mapped_memory() -> None:
    random = Random(6)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    for _ in range(FRAMES):
        there.send(damaged(random, bytes(8)))
        with contextlib.suppress(ValueError, OSError):
            assert 0 <= read_ack(here) < 2**64
    here.close()
    there.close()
