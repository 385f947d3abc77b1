"""What hundreds of connections and cancelled transfers leave behind: nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtransfer.events import BlocksSent, GrantClosed, SendFailed
from tests.kvtransfer.peers import DEADLINE, Peer, Spawn, spawner, transfer

ROW, BLOCKS = 64 << 10, 16
CONNECTIONS, CANCELLED = 200, 1000
WARM_UP = 20  # rounds until what is allocated once has been
MORE_MEMORY = 32 << 20  # bytes: half of what the cancelled transfers would leave at a row each


@pytest.fixture(params=["ucx", "memory"])
def spawn(request: pytest.FixtureRequest) -> Iterator[Spawn]:
    with spawner(request.param) as spawn:
        yield spawn


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def connect_and_close(sender: Peer, receiver: Peer, grant_id: int) -> None:
    transfer(sender, receiver, grant_id, [0], [1])
    receiver.thread.close_grant(grant_id)
    receiver.expect(GrantClosed)
    sender.thread.disconnect(receiver.address)


def cancel(sender: Peer, receiver: Peer, grant_id: int) -> None:
    """Close a grant before, while or after its blocks arrive; every tenth time both ends do."""
    receiver.thread.open_grant(grant_id, range(BLOCKS))
    sender.thread.send_blocks(receiver.address, grant_id, 0, range(BLOCKS), range(BLOCKS))
    time.sleep(grant_id % 4 * 0.0005)
    receiver.thread.close_grant(grant_id)
    if grant_id % 10 == 0:
        sender.thread.disconnect(receiver.address)
    sender.expect(BlocksSent | SendFailed)
    assert receiver.expect(GrantClosed).grant_id == grant_id


@pytest.mark.parametrize(("use", "times"), [(connect_and_close, CONNECTIONS), (cancel, CANCELLED)])
def test_nothing_is_left(spawn: Spawn, use: Callable[[Peer, Peer, int], None], times: int) -> None:
    sender, receiver = spawn(BLOCKS, ROW), spawn(BLOCKS, ROW)
    for grant_id in range(1, WARM_UP + 1):
        use(sender, receiver, grant_id)
    threads, descriptors, memory = threading.active_count(), num_descriptors(), resident()
    for grant_id in range(WARM_UP + 1, WARM_UP + 1 + times):
        use(sender, receiver, grant_id)
        sender.forget()
        receiver.forget()
    until = time.monotonic() + DEADLINE
    while num_descriptors() > descriptors or receiver.thread.snapshot().receives_in_flight:
        assert time.monotonic() < until, f"{num_descriptors() - descriptors} descriptors more"
        time.sleep(0.05)
    assert sender.thread.snapshot().sends_in_flight == 0
    assert receiver.thread.snapshot().open_grants == 0
    assert threading.active_count() == threads
    assert resident() - memory < MORE_MEMORY
    transfer(sender, receiver, 1, range(BLOCKS), range(BLOCKS))
