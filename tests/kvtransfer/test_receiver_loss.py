"""A receiving worker is killed or frozen while blocks are on the way to it over mapped memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kvtransfer.config import TransferConfig
from kvtransfer.events import BlocksSent, SendFailed
from tests.kvtransfer.peers import DEADLINE, Peer, Spawn, spawner, transfer

ROW, BLOCKS = 128 << 10, 1024
WINDOW = TransferConfig(stall=1.0, message_bytes=ROW, max_in_flight=4)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with spawner("auto") as spawn:
        yield spawn


@pytest.fixture
def lost() -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A process that receives grant 1, and its address."""
    command = [sys.executable, "-m", "tests.kvtransfer.receiving_worker"]
    worker = subprocess.Popen(
        [*command, "1", str(BLOCKS), str(ROW)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert worker.stdout is not None
    yield worker, worker.stdout.readline().strip().encode()
    worker.kill()
    worker.communicate()


def send_all(sender: Peer, address: bytes) -> None:
    """Every block in a batch of its own."""
    for block in range(BLOCKS):
        sender.thread.send_blocks(address, 1, block, [block], [block])


def ends(sender: Peer, count: int) -> int:
    """Wait for the ends of the batches; how many failed."""
    events = [sender.expect(BlocksSent | SendFailed) for _ in range(count)]
    return sum(isinstance(event, SendFailed) for event in events)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_its_batches_end_and_others_are_served_meanwhile(
    spawn: Spawn, lost: tuple[subprocess.Popen[str], bytes], how: signal.Signals
) -> None:
    worker, address = lost
    sender, receiver = spawn(BLOCKS, ROW, WINDOW), spawn(64, ROW)
    send_all(sender, address)
    sender.expect(BlocksSent)
    worker.send_signal(how)
    receiver.thread.open_grant(2, range(64))
    sender.thread.send_blocks(receiver.address, 2, 0, range(64), range(64))
    receiver.received(2, 64)  # a frozen peer is not given up yet
    failed = ends(sender, BLOCKS)  # all the rest, and that of grant 2
    assert failed > 0
    until = time.monotonic() + DEADLINE
    while sender.thread.snapshot().sends_in_flight:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert address.decode() not in sender.thread.snapshot().connections
    receiver.forget()
    transfer(sender, receiver, 3, range(8), range(8))
