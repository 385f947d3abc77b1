"""Mapped memory: who may connect with what, when a copy counts, and when UCX is taken instead."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from kernels.shared_memory import map_shared, shared_file, shared_zeros
from kvtransfer import memory as memory_module
from kvtransfer.events import BlocksSent, MessageRefused, SendFailed
from kvtransfer.memory import SCHEME, MemoryTransport
from kvtransfer.memory_frames import pack_offer, packet_socket, send_hello
from kvtransfer.memory_peers import MAX_UNACKED
from kvtransfer.transport import Message, Operation, Rows, TransportError
from tests.kvtransfer.peers import spawner, transfer

BLOCKS, ROW = 8, 512
DEADLINE = 20.0  # seconds


class End:
    """A transport with its arena, driven by hand."""

    def __init__(self, fill: int = 0) -> None:
        self.rows = shared_zeros((BLOCKS, ROW), torch.uint8).fill_(fill)
        self.transport = MemoryTransport(self.rows)

    def blocks(self, *blocks: int) -> Rows:
        return Rows(self.rows.numpy(), blocks)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            if not self.transport.progress():
                self.transport.wait(0.01)

    def probe(self) -> Message:
        found: list[Message] = []
        self.until(lambda: found.extend(filter(None, [self.transport.probe()])) or found)
        return found[0]

    def receive(self, message: Message, *blocks: int) -> Operation:
        operation = self.transport.receive(message, self.blocks(*blocks))
        self.until(lambda: operation.done)
        return operation


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    sender, receiver = End(0xAB), End()
    yield sender, receiver
    sender.transport.shutdown()
    receiver.transport.shutdown()


def offer(sender: End, receiver: End, *blocks: int) -> tuple[Operation, Message]:
    connection = sender.transport.connect(receiver.transport.address)
    operation = sender.transport.send(connection, 5, sender.blocks(*blocks))
    return operation, receiver.probe()


def test_an_operation_ends_with_the_peers_ack(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sent, message = offer(sender, receiver, 1, 7)
    sender.transport.progress()
    assert not sent.done
    received = receiver.receive(message, 0, 4)
    assert received.error is None
    sender.until(lambda: sent.done)
    assert sent.error is None
    assert (receiver.rows[[0, 4]] == 0xAB).all()


def test_a_copy_of_blocks_that_were_given_up_fails(ends: tuple[End, End]) -> None:
    """The sender may reuse them from then on, so what was read may be anything."""
    sender, receiver = ends
    connection = sender.transport.connect(receiver.transport.address)
    sent = sender.transport.send(connection, 5, sender.blocks(1))
    received = receiver.transport.receive(receiver.probe(), receiver.blocks(1))
    sender.transport.close(connection)
    assert sent.error
    receiver.until(lambda: received.done)
    assert received.error


def test_a_copy_during_which_the_sender_gave_up_fails(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    connection = sender.transport.connect(receiver.transport.address)
    sender.transport.send(connection, 5, sender.blocks(1))
    message = receiver.probe()
    copy_blocks = memory_module.copy_blocks

    def copy_then_close(*arguments: object) -> list[int]:
        digests = copy_blocks(*arguments)  # type: ignore[arg-type]
        sender.transport.close(connection)
        return digests

    monkeypatch.setattr(memory_module, "copy_blocks", copy_then_close)
    received = receiver.receive(message, 1)
    assert received.error
    assert received.digests is None


def test_closing_what_comes_in_ends_both_sides(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sent, message = offer(sender, receiver, 1)
    received = receiver.transport.receive(message, receiver.blocks(1))
    receiver.transport.close_incoming()
    assert received.error
    sender.until(lambda: sent.done)
    assert sent.error
    assert not receiver.rows.any()


def test_more_than_the_window_arrives_in_order(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    connection = sender.transport.connect(receiver.transport.address)
    count = 3 * MAX_UNACKED
    sent = [sender.transport.send(connection, i, sender.blocks(1)) for i in range(count)]
    for i in range(count):
        sender.transport.progress()
        message = receiver.probe()
        assert message.tag == i
        assert receiver.receive(message, 2).error is None
    sender.until(lambda: all(operation.done for operation in sent))


def test_rows_of_another_shape_and_the_same_length_are_refused() -> None:
    with spawner("memory") as spawn:
        sender, receiver = spawn(8, 256), spawn(8, 512)
        before = receiver.rows.clone()
        receiver.thread.open_grant(1, [3])
        connection_tag = 1 << 32 | 1  # one position, and two rows of half the size
        sender.thread.send_blocks(receiver.address, 1, 0, [1, 2], [1, 2])
        assert receiver.expect(MessageRefused).reason == "out_of_range"
        transport = MemoryTransport(sender.rows)
        connection = transport.connect(receiver.address)
        sent = transport.send(connection, connection_tag, Rows(sender.rows.numpy(), [1, 2]))
        deadline = time.monotonic() + DEADLINE
        while not sent.done:
            assert time.monotonic() < deadline
            transport.progress()
        transport.shutdown()
        assert torch.equal(receiver.rows, before)
        assert receiver.thread.alive


# Peers that are none of ours ------------------------------------------------------------------


def sealed() -> int:
    file = shared_file(KEPT)
    assert file is not None
    return file


def unsealed() -> int:
    file = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(file, BLOCKS * ROW)
    return file


KEPT = shared_zeros((BLOCKS, ROW), torch.uint8)
OFFER = pack_offer(0, 1, [1])


def greet(peer: socket.socket) -> None:
    send_hello(peer, ROW, BLOCKS, sealed())


def send(*frames: bytes) -> Callable[[socket.socket], None]:
    def speak(peer: socket.socket) -> None:
        greet(peer)
        for frame in frames:
            peer.send(frame)

    return speak


def is_hung_up(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize(
    "speak",
    [
        lambda peer: send_hello(peer, ROW, BLOCKS, unsealed()),
        lambda peer: send_hello(peer, ROW, BLOCKS + 1, sealed()),
        lambda peer: send_hello(peer, 0, BLOCKS, sealed()),
        lambda peer: send_hello(peer, 2**63, 2**63, sealed()),
        lambda peer: send_hello(peer, ROW, BLOCKS, os.open("/dev/null", os.O_RDONLY)),
        lambda peer: peer.send(struct.pack("=8sQQ", b"kvferry1", ROW, BLOCKS)),
        lambda peer: peer.send(b"GET / HTTP/1.1"),
        send(pack_offer(0, 1, [BLOCKS])),
        send(pack_offer(0, 1, [2**32 - 1])),
        send(pack_offer(0, 1, [])),
        send(OFFER + b"\0"),
        send(b"\0"),
        send(OFFER + bytes(1 << 15)),
        send(OFFER, OFFER),
        send(*(pack_offer(i, 1, [1]) for i in range(MAX_UNACKED + 1))),
    ],
)
def test_who_breaks_the_rules_is_hung_up_on(
    ends: tuple[End, End], speak: Callable[[socket.socket], None]
) -> None:
    sender, receiver = ends
    stranger = packet_socket()
    stranger.connect(b"\0" + receiver.transport.address.removeprefix(SCHEME))
    speak(stranger)
    receiver.until(lambda: is_hung_up(stranger))
    stranger.close()
    assert receiver.transport.probe() is None
    assert not receiver.rows.any()
    sent, message = offer(sender, receiver, 1)  # others are served
    assert receiver.receive(message, 1).error is None
    sender.until(lambda: sent.done)


def test_an_ack_of_nothing_fails_the_connection(ends: tuple[End, End]) -> None:
    sender, _ = ends
    listener = packet_socket()
    listener.bind(b"\0kvferry-test-%d" % os.getpid())
    listener.listen()
    connection = sender.transport.connect(SCHEME + b"kvferry-test-%d" % os.getpid())
    sent = sender.transport.send(connection, 1, sender.blocks(1))
    peer, _ = listener.accept()
    peer.send(struct.pack("=Q", 99))
    sender.until(lambda: sent.done)
    assert sent.error
    with pytest.raises(TransportError, match="lost"):
        sender.transport.send(connection, 1, sender.blocks(1))
    peer.close()
    listener.close()


def test_another_user_is_refused(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = ends
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransportError, match="another user"):
        sender.transport.connect(receiver.transport.address)
    stranger = packet_socket()
    stranger.connect(b"\0" + receiver.transport.address.removeprefix(SCHEME))
    receiver.until(lambda: is_hung_up(stranger))
    stranger.close()


# The memory ------------------------------------------------------------------------------------


def test_others_may_neither_write_nor_resize_it() -> None:
    rows = shared_zeros((4, 4096), torch.uint8)
    file = shared_file(rows)
    assert file is not None
    with pytest.raises(PermissionError):
        mmap.mmap(file, 4 * 4096)
    for size in (0, 8 * 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(file, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    mapped = np.frombuffer(map_shared(file, 4 * 4096), np.uint8)
    rows.fill_(3)
    assert (mapped == 3).all()
    assert not mapped.flags.writeable


def test_its_file_is_closed_with_it() -> None:
    rows = shared_zeros((4, 4096), torch.bfloat16)
    file = shared_file(rows)
    assert file is not None
    assert rows.dtype == torch.bfloat16
    assert not rows.any()
    del rows
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file)


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        shared_zeros((1 << 40, 1 << 20), torch.uint8)


# The choice ------------------------------------------------------------------------------------


def test_memory_on_one_host_and_ucx_elsewhere() -> None:
    with spawner("auto") as spawn, spawner("ucx") as spawn_ucx:
        sender, receiver, remote = spawn(64, ROW), spawn(64, ROW), spawn_ucx(64, ROW)
        transfer(sender, receiver, 1, [1, 5, 2], [7, 8, 9])
        transfer(sender, remote, 1, [1, 5, 2], [7, 8, 9])
        transfer(remote, receiver, 2, [3, 6, 4], [3, 2, 1])
        elsewhere = receiver.address.partition(b";")[0] + b";memory:kvferry-nobody"
        receiver.thread.open_grant(3, [4])
        sender.thread.send_blocks(elsewhere, 3, 0, [1], [4])
        sender.expect(BlocksSent)
        receiver.received(3, 1)
        used = sender.thread.snapshot().connections
        assert used[receiver.address.decode()] == "memory/memfd"
        assert "memory" not in used[elsewhere.decode()]
        assert "memory" not in used[remote.address.decode()]
        remote.thread.send_blocks(b"memory:kvferry-nobody", 1, 0, [1], [1])
        assert "address" in remote.expect(SendFailed).reason


def test_private_memory_receives_and_sends_over_ucx() -> None:
    with spawner("auto") as spawn, spawner("auto, private") as spawn_private:
        shared, private = spawn(64, ROW), spawn_private(64, ROW)
        transfer(shared, private, 1, [1, 5, 2], [7, 8, 9])
        transfer(private, shared, 2, [3, 6, 4], [3, 2, 1])
        [[there], [back]] = [p.thread.snapshot().connections.values() for p in (shared, private)]
        assert there == "memory/memfd"
        assert "memory" not in back


# No descriptors left ---------------------------------------------------------------------------


def test_without_descriptors_it_sleeps_and_later_accepts(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    stranger = packet_socket()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno() + 1, hard))
    try:
        taken = []
        with contextlib.suppress(OSError):  # the rest of the numbers below
            while True:
                taken.append(os.dup(stranger.fileno()))
        stranger.connect(b"\0" + receiver.transport.address.removeprefix(SCHEME))
        monkeypatch.setattr(memory_module, "PAUSE", 0.2)
        receiver.transport.progress()
        rounds = sum(receiver.transport.progress() for _ in range(50))
        assert rounds == 0, "it spins"
    finally:
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stranger.close()
    sent, message = offer(sender, receiver, 1)
    assert receiver.receive(message, 1).error is None
    sender.until(lambda: sent.done)
