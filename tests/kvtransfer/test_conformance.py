"""What a transfer promises, on every transport, of blocks as they are and quantised."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from kvtransfer.arena import Arena
from kvtransfer.config import TransferConfig
from kvtransfer.events import (
    BlocksReceived,
    BlocksSent,
    Died,
    GrantClosed,
    MessageRefused,
    SendFailed,
)
from kvtransfer.inproc import InProcessNetwork
from kvtransfer.thread import TransferThread
from kvtransfer.transport import Transport, TransportError
from tests.kvtransfer.peers import DEADLINE, Spawn, spawner, transfer

SMALL, LARGE = 512, 64 << 10  # bytes of a row: packed, and sent from the arena
TIGHT = TransferConfig(
    staging_bytes=4 * SMALL,
    staging_slots=1,
    in_place_bytes=4 * SMALL,
    message_bytes=4 * SMALL,
    max_in_flight=1,
)


STAGED = ["inproc", "inproc, int8", "ucx", "ucx, int8"]  # others need no staging


@pytest.fixture(params=[*STAGED, "memory"])
def spawn(request: pytest.FixtureRequest) -> Iterator[Spawn]:
    with spawner(request.param) as spawn:
        yield spawn


@pytest.mark.parametrize("row_bytes", [8, SMALL, LARGE, 3 << 20])
@pytest.mark.parametrize("scattered", ["neither", "source", "destination", "both"])
def test_blocks_arrive(spawn: Spawn, row_bytes: int, scattered: str) -> None:
    sender, receiver = spawn(16, row_bytes), spawn(16, row_bytes)
    untouched = receiver.rows.clone()
    source = [9, 3, 4, 5, 0, 12, 11] if scattered in ("source", "both") else [*range(2, 9)]
    destination = (
        [1, 2, 7, 8, 15, 0, 5] if scattered in ("destination", "both") else [*range(5, 12)]
    )
    transfer(sender, receiver, 1, source, destination)
    others = [block for block in range(16) if block not in destination]
    assert torch.equal(receiver.rows[others], untouched[others])


def test_64_mib(spawn: Spawn) -> None:
    sender, receiver = spawn(512, 128 << 10), spawn(512, 128 << 10)
    transfer(sender, receiver, 1, range(512), range(512))
    assert sender.thread.snapshot().bytes_sent == 512 * sender.wire_bytes
    assert receiver.thread.snapshot().bytes_received == 512 * sender.wire_bytes


@pytest.mark.parametrize("row_bytes", [SMALL, LARGE])
def test_many_grants_in_both_directions(spawn: Spawn, row_bytes: int) -> None:
    """Forty grants of scattered blocks, each sent in three batches, the batches interleaved."""
    peers = [spawn(400, row_bytes) for _ in range(2)]
    expected = []
    shuffle = random.Random(0)
    for peer, other in (peers, peers[::-1]):
        source, destination = shuffle.sample(range(200), 200), shuffle.sample(range(200, 400), 200)
        for grant_id in range(1, 21):
            other.thread.open_grant(grant_id, destination[grant_id * 10 - 10 : grant_id * 10])
        for first, last in ((0, 3), (3, 4), (4, 10)):
            for grant_id in range(1, 21):
                at = grant_id * 10 - 10
                mine, theirs = source[at + first : at + last], destination[at + first : at + last]
                peer.thread.send_blocks(other.address, grant_id, first, mine, theirs)
        expected.append((other, destination, peer.rows[source].clone()))
    for peer in peers:
        for _ in range(60):
            peer.expect(BlocksSent)
    for other, destination, rows in expected:
        count = 0
        while count < 200:
            count += len(other.expect(BlocksReceived).digests)
        assert torch.equal(other.rows[destination], rows)


def test_tiny_staging_holds_messages_back(spawn: Spawn) -> None:
    sender, receiver = spawn(400, SMALL, TIGHT), spawn(400, SMALL, TIGHT)
    blocks = random.Random(0).sample(range(400), 400)
    transfer(sender, receiver, 1, blocks, blocks[::-1])
    per_message = TIGHT.staging_bytes // sender.wire_bytes
    assert receiver.thread.snapshot().messages_received == 400 // per_message


# What is refused -----------------------------------------------------------------------------


def assert_refused(spawn: Spawn, reason: str, **case: int) -> None:
    """A grant of four blocks stays as it was; one message is refused for a reason."""
    sender, receiver = spawn(32, case.get("row_bytes", SMALL)), spawn(32, SMALL)
    before = receiver.rows.clone()
    receiver.thread.open_grant(7, [1, 2, 3, 4])
    if case.get("close"):
        receiver.thread.close_grant(7)
        assert receiver.expect(GrantClosed).grant_id == 7
    count, grant_id = case.get("count", 4), case.get("grant_id", 7)
    blocks = range(count)
    sender.thread.send_blocks(receiver.address, grant_id, case.get("first", 0), blocks, blocks)
    assert receiver.expect(MessageRefused) == MessageRefused(grant_id, reason)
    sender.expect(BlocksSent)  # taken off the wire
    assert torch.equal(receiver.rows, before)
    assert receiver.thread.snapshot().refused == {reason: 1}
    assert not receiver.untaken(BlocksReceived)


def test_unknown_grant(spawn: Spawn) -> None:
    assert_refused(spawn, "unknown_grant", grant_id=8)


def test_closed_grant(spawn: Spawn) -> None:
    assert_refused(spawn, "unknown_grant", close=True)


def test_past_the_end(spawn: Spawn) -> None:
    assert_refused(spawn, "out_of_range", first=3, count=2)


@pytest.mark.parametrize("row_bytes", [SMALL // 2, SMALL * 2, LARGE])
def test_wrong_length(spawn: Spawn, row_bytes: int) -> None:
    assert_refused(spawn, "wrong_length", row_bytes=row_bytes, count=1)


def test_duplicate(spawn: Spawn) -> None:
    sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
    transfer(sender, receiver, 7, [1, 2, 3], [4, 5, 6])
    before = receiver.rows.clone()
    sender.thread.send_blocks(receiver.address, 7, 2, [0], [6])
    assert receiver.expect(MessageRefused) == MessageRefused(7, "duplicate")
    assert torch.equal(receiver.rows, before)


@pytest.mark.parametrize("spawn", STAGED, indirect=True)
def test_too_much_for_staging(spawn: Spawn) -> None:
    """The peer packs more than a slot of this end can hold."""
    sender, receiver = spawn(32, SMALL), spawn(32, SMALL, TIGHT)
    receiver.thread.open_grant(7, [*range(0, 32, 2)])
    sender.thread.send_blocks(receiver.address, 7, 0, range(16), range(16))
    assert receiver.expect(MessageRefused) == MessageRefused(7, "not_adjacent")


def test_a_changed_block_changes_its_digest(spawn: Spawn) -> None:
    sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
    before = transfer(sender, receiver, 1, [0, 1, 2], [0, 1, 2])
    sender.rows[1, 101] ^= 0x80  # the sign of a number, where there are numbers
    receiver.thread.open_grant(2, [3, 4, 5])
    sender.thread.send_blocks(receiver.address, 2, 0, [0, 1, 2], [3, 4, 5])
    after = receiver.received(2, 3)
    assert [after[i] == before[i] for i in range(3)] == [True, False, True]


# What ends -----------------------------------------------------------------------------------


def test_close_while_blocks_arrive(spawn: Spawn) -> None:
    """After ``GrantClosed`` the memory is the owner's alone, whatever is still being sent."""
    sender, receiver = spawn(256, LARGE), spawn(256, LARGE)
    receiver.thread.open_grant(7, range(256))
    sender.thread.send_blocks(receiver.address, 7, 0, range(256), range(256))
    receiver.expect(BlocksReceived)
    receiver.thread.close_grant(7)
    receiver.expect(GrantClosed)
    receiver.rows.zero_()
    sender.expect(BlocksSent)
    assert not receiver.rows.any()
    assert not receiver.untaken(GrantClosed)
    receiver.forget()
    transfer(sender, receiver, 7, range(5), range(5))  # the number may be used again


def test_closing_twice_reports_once(spawn: Spawn) -> None:
    receiver = spawn(8, SMALL)
    receiver.thread.open_grant(7, [1])
    for _ in range(2):
        receiver.thread.close_grant(7)
    receiver.thread.open_grant(8, [1])
    receiver.thread.close_grant(8)
    assert [receiver.expect(GrantClosed).grant_id for _ in range(2)] == [7, 8]


def test_every_batch_ends_once_when_the_peer_is_given_up(spawn: Spawn) -> None:
    sender, receiver = spawn(64, LARGE), spawn(64, LARGE)
    receiver.thread.open_grant(1, range(64))
    for first in range(64):
        sender.thread.send_blocks(receiver.address, 1, first, [first], [first])
    sender.thread.disconnect(receiver.address)
    ended = sorted(sender.expect(BlocksSent | SendFailed).first for _ in range(64))
    assert ended == [*range(64)]
    receiver.thread.close_grant(1)
    receiver.expect(GrantClosed)  # nothing of the first grant can come after it
    receiver.forget()
    transfer(sender, receiver, 2, range(4), range(4))  # connects anew
    assert not sender.untaken(BlocksSent | SendFailed)


def test_peer_that_is_gone(spawn: Spawn) -> None:
    sender, receiver, third = spawn(8, SMALL), spawn(8, SMALL), spawn(8, SMALL)
    transfer(sender, receiver, 1, [1], [1])
    receiver.thread.stop()
    deadline = time.monotonic() + DEADLINE
    while True:  # what is sent before the loss is noticed may still be counted as sent
        sender.thread.send_blocks(receiver.address, 1, 0, [1], [1])
        if isinstance(sender.expect(BlocksSent | SendFailed), SendFailed):
            break
        assert time.monotonic() < deadline
    transfer(sender, third, 1, [1], [1])


def test_peer_that_came_back_on_its_address(spawn: Spawn) -> None:
    sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
    transfer(sender, receiver, 1, [1], [1])
    receiver.thread.stop()
    reborn = spawn(8, SMALL, at=receiver.address)
    assert reborn.address == receiver.address
    reborn.thread.open_grant(2, [3])
    deadline = time.monotonic() + DEADLINE
    while True:
        sender.thread.send_blocks(reborn.address, 2, 0, [5], [3])
        sender.expect(BlocksSent | SendFailed)
        if reborn.untaken(BlocksReceived):
            break
        assert time.monotonic() < deadline
    assert torch.equal(reborn.rows[3], sender.rows[5])


def test_not_an_address(spawn: Spawn) -> None:
    sender = spawn(8, SMALL)
    sender.thread.send_blocks(b"\xff nowhere", 1, 0, [1], [1])
    assert "address" in sender.expect(SendFailed).reason


def test_grants_never_stand_in_each_others_way(spawn: Spawn) -> None:
    """A peer that takes nothing costs others nothing."""
    narrow = TransferConfig(staging_bytes=32 * SMALL, staging_slots=4, max_in_flight=2)
    takes_nothing = TransferConfig(max_in_flight=0)
    sender, receiver = spawn(300, SMALL, narrow), spawn(300, SMALL)
    deaf = spawn(300, SMALL, takes_nothing)
    shuffled = random.Random(1).sample(range(300), 300)
    deaf.thread.open_grant(1, range(300))
    sender.thread.send_blocks(deaf.address, 1, 0, shuffled, range(300))
    transfer(sender, receiver, 2, shuffled, range(300))
    assert sender.thread.snapshot().sends_in_flight == 1
    sender.thread.disconnect(deaf.address)
    assert sender.expect(SendFailed).grant_id == 1


# Its own life --------------------------------------------------------------------------------


def test_arguments_are_checked(spawn: Spawn) -> None:
    thread = spawn(8, SMALL).thread
    for grant_id, blocks in ((0, [1]), (2**32, [1]), (1, [8]), (1, [-1])):
        with pytest.raises(ValueError, match=r"out of range|blocks"):
            thread.open_grant(grant_id, blocks)
    for first, source, destination in (
        (0, [], []),
        (0, [1], [1, 2]),
        (-1, [1], [1]),
        (0, [8], [8]),
    ):
        with pytest.raises(ValueError, match=r"out of range|blocks"):
            thread.send_blocks(b"x", 1, first, source, destination)


def test_odd_rows_are_refused() -> None:
    for rows in (torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 16).T, torch.zeros(8)):
        with pytest.raises(ValueError, match="row"):
            Arena(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_element_types(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 64).to(dtype)
    assert bytes(Arena(rows).run([1, 2])) == bytes(rows[1:3].view(torch.uint8).numpy())


def test_an_error_on_the_thread_is_reported(spawn: Spawn) -> None:
    peer = spawn(8, SMALL)
    peer.thread.open_grant(1, [1])
    peer.thread.open_grant(1, [1])  # the owner's mistake
    assert "opened twice" in peer.expect(Died).reason


def test_a_transport_that_cannot_open() -> None:
    def broken() -> Transport:
        raise TransportError("no wire")

    thread = TransferThread(torch.zeros(2, 8), broken, lambda event: None)
    with pytest.raises(TransportError, match="no wire"):
        thread.start()
    thread.stop()


def test_idle_costs_nothing(spawn: Spawn) -> None:
    sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
    transfer(sender, receiver, 1, [1], [1])
    time.sleep(0.1)
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.2


def test_in_process_kill() -> None:
    network = InProcessNetwork()
    with spawner("inproc", network) as spawn:
        sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
        transfer(sender, receiver, 1, [1], [1])
        network.kill(receiver.address)
        sender.thread.send_blocks(receiver.address, 1, 0, [1], [1])
        assert sender.expect(SendFailed).reason
