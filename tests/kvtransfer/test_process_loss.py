"""A peer process is killed or frozen at every point of a message; nothing may be left hanging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from kvtransfer.transport import Message, Operation
from kvtransfer.ucx import UCXTransport

pytestmark = pytest.mark.usefixtures("loopback_only")

EAGER, RENDEZVOUS, LONG = 4 << 10, 128 << 10, 64 << 20  # bytes
DEADLINE = 20.0  # seconds

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def transport() -> Iterator[UCXTransport]:
    transport = UCXTransport("127.0.0.1")
    yield transport
    transport.shutdown()


@pytest.fixture
def start() -> Iterator[Start]:
    victims = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.kvtransfer.victim", *arguments]
        victim = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        victims.append(victim)
        assert victim.stdout is not None
        return victim

    yield start
    for victim in victims:
        victim.kill()
        victim.communicate()


def line(victim: subprocess.Popen[str]) -> str:
    assert victim.stdout is not None
    return victim.stdout.readline().strip()


def until(transport: UCXTransport, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if not transport.progress():
            transport.wait(0.01)


def settle(transport: UCXTransport, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        transport.progress()
        transport.wait(0.01)


def probe(transport: UCXTransport) -> Message:
    found: list[Message] = []

    def look() -> bool:
        message = transport.probe()
        if message is not None:
            found.append(message)
        return bool(found)

    until(transport, look)
    return found[0]


def kill(victim: subprocess.Popen[str]) -> None:
    victim.send_signal(signal.SIGKILL)
    victim.wait()


def receive(
    transport: UCXTransport, message: Message
) -> tuple[int, npt.NDArray[np.uint8], Operation]:
    """Receive a message to its end: its tag, its bytes, and how it went."""
    buffer = np.zeros(message.length, np.uint8)
    operation = transport.receive(message, buffer)
    until(transport, lambda: operation.done)
    return message.tag, buffer, operation


def assert_serves(transport: UCXTransport, start: Start) -> None:
    """The survivor takes a message from a new peer."""
    start("offer", transport.address.decode(), "77", str(RENDEZVOUS), "1")
    tag = 0
    while tag != 77:  # what the dead have offered comes first
        tag, buffer, operation = receive(transport, probe(transport))
    assert operation.error is None
    assert (buffer == 0xAB).all()


@pytest.mark.parametrize("length", [EAGER, RENDEZVOUS, LONG])
def test_killed_after_the_offer_before_the_receive(
    transport: UCXTransport, start: Start, length: int
) -> None:
    victim = start("offer", transport.address.decode(), "1", str(length), "4")
    line(victim)
    first = probe(transport)
    kill(victim)
    settle(transport, 0.2)
    buffer = np.zeros(length, np.uint8)
    operations: list[Operation] = [transport.receive(first, buffer)]
    until(transport, lambda: operations[0].done)
    while (message := transport.probe()) is not None:
        operations.append(transport.receive(message, buffer))
    until(transport, lambda: all(operation.done for operation in operations))
    for operation in operations:
        assert (operation.error is None) == (length == EAGER)  # eager bytes had already come
    assert_serves(transport, start)


@pytest.mark.parametrize("length", [RENDEZVOUS, LONG])
def test_killed_while_frozen_after_the_receive(
    transport: UCXTransport, start: Start, length: int
) -> None:
    victim = start("offer", transport.address.decode(), "1", str(length), "1")
    line(victim)
    message = probe(transport)
    victim.send_signal(signal.SIGSTOP)
    operation = transport.receive(message, np.zeros(length, np.uint8))
    settle(transport, 0.2)
    assert not operation.done
    kill(victim)
    until(transport, lambda: operation.done)
    assert operation.error
    assert_serves(transport, start)


def test_killed_in_the_middle(transport: UCXTransport, start: Start) -> None:
    victim = start("offer", transport.address.decode(), "1", str(4 * LONG), "1")
    line(victim)
    buffer = np.zeros(4 * LONG, np.uint8)
    operation = transport.receive(probe(transport), buffer)
    until(transport, lambda: bool(buffer[:LONG].any()))
    kill(victim)
    until(transport, lambda: operation.done)
    assert operation.error
    written = int(buffer.sum(dtype=np.int64))
    settle(transport, 0.2)
    assert int(buffer.sum(dtype=np.int64)) == written, "a failed receive still writes"
    assert_serves(transport, start)


def test_killed_after_the_end(transport: UCXTransport, start: Start) -> None:
    victim = start("offer", transport.address.decode(), "1", str(RENDEZVOUS), "1")
    line(victim)
    buffer = np.zeros(RENDEZVOUS, np.uint8)
    operation = transport.receive(probe(transport), buffer)
    until(transport, lambda: operation.done)
    assert line(victim) == "ok"
    kill(victim)
    settle(transport, 0.2)
    assert operation.error is None
    assert (buffer == 0xAB).all()
    assert_serves(transport, start)


def test_frozen_sender_is_given_up_by_closing_what_comes_in(
    transport: UCXTransport, start: Start
) -> None:
    victim = start("offer", transport.address.decode(), "1", str(LONG), "2")
    line(victim)
    message, unposted = probe(transport), probe(transport)
    victim.send_signal(signal.SIGSTOP)
    buffer = np.zeros(LONG, np.uint8)
    operation = transport.receive(message, buffer)
    settle(transport, 0.2)
    assert not operation.done
    transport.close_incoming()
    until(transport, lambda: operation.done)
    assert operation.error
    assert receive(transport, unposted)[2].error
    written = int(buffer.sum(dtype=np.int64))
    victim.send_signal(signal.SIGCONT)
    settle(transport, 0.5)
    assert line(victim) != "ok"  # the sender hears of it too
    assert int(buffer.sum(dtype=np.int64)) == written, "a given up sender still writes"
    assert_serves(transport, start)


@pytest.mark.parametrize("length", [RENDEZVOUS, LONG])
@pytest.mark.parametrize("freeze", [False, True])
def test_receiver_is_killed(
    transport: UCXTransport, start: Start, length: int, freeze: bool
) -> None:
    victim = start("take")
    connection = transport.connect(line(victim).encode())
    greeting = transport.send(connection, 1, np.zeros(EAGER, np.uint8))
    until(transport, lambda: greeting.done)
    assert line(victim) == "ok"
    if freeze:
        victim.send_signal(signal.SIGSTOP)
    buffer = np.zeros(4 * length, np.uint8)
    operations = [transport.send(connection, i, buffer) for i in range(4)]
    settle(transport, 0.01)
    kill(victim)
    until(transport, lambda: all(operation.done for operation in operations))
    assert operations[-1].error or not freeze
    transport.close(connection)


def test_frozen_receiver_is_given_up_by_closing(transport: UCXTransport, start: Start) -> None:
    victim = start("take")
    connection = transport.connect(line(victim).encode())
    greeting = transport.send(connection, 1, np.zeros(EAGER, np.uint8))
    until(transport, lambda: greeting.done)
    victim.send_signal(signal.SIGSTOP)
    operation = transport.send(connection, 2, np.zeros(LONG, np.uint8))
    settle(transport, 0.2)
    assert not operation.done
    transport.close(connection)
    until(transport, lambda: operation.done)
    assert operation.error


def test_nobody_listens(transport: UCXTransport) -> None:
    connection = transport.connect(b"127.0.0.1:1")
    operation = transport.send(connection, 1, np.zeros(RENDEZVOUS, np.uint8))
    until(transport, lambda: operation.done)
    assert operation.error
    transport.close(connection)


def test_a_survivor_leaves_cleanly() -> None:
    """A process that has lost a peer in mid-message exits with status 0: no abort, no hang."""
    script = f"""
import os, signal, subprocess, sys
import numpy as np
from tests.kvtransfer.test_process_loss import line, probe, until
from kvtransfer.ucx import UCXTransport
transport = UCXTransport("127.0.0.1")
command = [sys.executable, "-m", "tests.kvtransfer.victim"]
command += ["offer", transport.address.decode(), "1", "{LONG}", "1"]
victim = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
line(victim)
operation = transport.receive(probe(transport), np.zeros({LONG}, np.uint8))
victim.send_signal(signal.SIGKILL)
until(transport, lambda: operation.done)
transport.shutdown()
"""
    environment = {**os.environ, "PYTHONPATH": "."}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, timeout=60, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
