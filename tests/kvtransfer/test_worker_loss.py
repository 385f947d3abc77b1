"""A sending worker is killed or frozen while its blocks arrive; the grant still closes."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kvtransfer.config import TransferConfig
from kvtransfer.events import (
    BlocksReceived,
    BlocksSent,
    GrantClosed,
    ReceiveFailed,
    SendFailed,
)
from tests.kvtransfer.peers import DEADLINE, Peer, spawner
from tests.stack import eventually

pytestmark = pytest.mark.usefixtures("loopback_only")

ROW, BLOCKS = 128 << 10, 2048  # 256 MiB: long enough to be interrupted

Start = Callable[[int, int], subprocess.Popen[str]]


CASES = {  # transport, and how long a stall lasts
    "ucx": ("ucx", TransferConfig(stall=0.5)),
    "auto": ("auto", TransferConfig(stall=0.5)),
    "given up": ("ucx", TransferConfig(stall=4 * DEADLINE, closing_stall=0.5)),
}


@pytest.fixture(params=["ucx", "auto"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Peer]:
    kind, config = CASES[request.param]
    with spawner(kind) as spawn:
        yield spawn(BLOCKS, ROW, config)


@pytest.fixture
def start(receiver: Peer) -> Iterator[Start]:
    workers = []

    def start(grant_id: int, num_blocks: int) -> subprocess.Popen[str]:
        arguments = [receiver.address.decode(), str(grant_id), str(num_blocks), str(ROW)]
        command = [sys.executable, "-m", "tests.kvtransfer.sending_worker", *arguments]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.kill()
        worker.communicate()


def mapped(receiver: Peer) -> bool:
    """Then what had not begun to be copied is lost in silence, and what had is often complete."""
    return b"memory:" in receiver.address


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_sender_is_lost_in_the_middle(receiver: Peer, start: Start, how: signal.Signals) -> None:
    receiver.thread.open_grant(1, range(BLOCKS))
    lost = start(1, BLOCKS)
    receiver.expect(BlocksReceived)
    lost.send_signal(how)
    if not mapped(receiver):
        assert receiver.expect(ReceiveFailed).grant_id == 1
    receiver.thread.close_grant(1)
    assert receiver.expect(GrantClosed).grant_id == 1
    receiver.rows.zero_()

    receiver.thread.open_grant(2, range(64))
    start(2, 64)
    receiver.forget()
    receiver.received(2, 64)
    assert (receiver.rows[:64] == 0xAB).all()
    assert not receiver.rows[64:].any(), "something still writes for the lost sender"


@pytest.mark.parametrize("receiver", ["given up"], indirect=True)
def test_a_frozen_sender_that_is_given_up_does_not_keep_the_blocks(
    receiver: Peer, start: Start
) -> None:
    receiver.thread.open_grant(1, range(BLOCKS))
    frozen = start(1, BLOCKS)
    receiver.expect(BlocksReceived)
    frozen.send_signal(signal.SIGSTOP)
    receiver.thread.close_grant(1)
    assert receiver.expect(GrantClosed).grant_id == 1


def test_restarted_sender_sends_the_rest(receiver: Peer, start: Start) -> None:
    """Positions of failed messages may be sent again; those received may not."""
    receiver.thread.open_grant(1, range(BLOCKS))
    lost = start(1, BLOCKS)
    receiver.expect(BlocksReceived)
    lost.kill()
    if not mapped(receiver):
        receiver.expect(ReceiveFailed)
        assert receiver.thread.snapshot().failed_receives > 0
    start(1, BLOCKS)
    whole = BLOCKS * ROW
    while receiver.thread.snapshot().bytes_received < whole:
        assert isinstance(receiver.expect(BlocksReceived), BlocksReceived)
    assert eventually(lambda: "duplicate" in receiver.thread.snapshot().refused, DEADLINE)
    assert (receiver.rows == 0xAB).all()


@pytest.mark.parametrize("receiver", ["ucx"], indirect=True)  # nothing else waits for a sender
def test_a_frozen_sender_is_given_up_though_others_send(receiver: Peer, start: Start) -> None:
    receiver.thread.open_grant(1, range(BLOCKS // 2))
    lost = start(1, BLOCKS // 2)
    receiver.expect(BlocksReceived)
    lost.send_signal(signal.SIGSTOP)
    receiver.thread.close_grant(1)
    with spawner("ucx") as spawn:
        sender, deadline = spawn(8, ROW), time.monotonic() + DEADLINE
        for grant_id in itertools.count(2):
            receiver.thread.open_grant(grant_id, [BLOCKS - 1])
            sender.thread.send_blocks(receiver.address, grant_id, 0, [0], [BLOCKS - 1])
            sender.expect(BlocksSent | SendFailed)
            receiver.thread.close_grant(grant_id)
            if any(event.grant_id == 1 for event in receiver.untaken(GrantClosed)):
                break
            assert time.monotonic() < deadline, "its blocks are never freed"


@pytest.mark.parametrize("receiver", ["given up"], indirect=True)
def test_a_frozen_sender_leaves_room_for_others(receiver: Peer, start: Start) -> None:
    """It has offered all it may before its connection is given up, and holds part of the slots."""
    theirs, others = range(BLOCKS - 64), range(BLOCKS - 64, BLOCKS)
    receiver.thread.open_grant(1, theirs, b"frozen")
    frozen = start(1, len(theirs))
    receiver.expect(BlocksReceived)
    frozen.send_signal(signal.SIGSTOP)
    receiver.thread.open_grant(2, others, b"other")
    start(2, len(others))
    arrived = 0
    while arrived < len(others):
        event = receiver.expect(BlocksReceived)
        arrived += len(event.digests) * (event.grant_id == 2)
    assert (receiver.rows[others.start :] == 0xAB).all()
    half = TransferConfig().max_in_flight // 2
    assert 0 < receiver.thread.snapshot().receives_in_flight <= half
    assert not receiver.untaken(ReceiveFailed)
    receiver.thread.close_grant(1)
    assert receiver.expect(GrantClosed).grant_id == 1
    assert receiver.thread.snapshot().refused["closing_grant"] > 0  # what had waited
