"""Who holds the cluster's key is let in, in both directions; strangers are hung up on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvtransfer import ucx, ucx_peers
from kvtransfer.events import MessageRefused, SendFailed
from kvtransfer.proof import ANSWER_BYTES, HELLO_BYTES, Connector, Listener, NotProvenError
from kvtransfer.ucx import UCXTransport
from tests.kvtransfer.peers import DEADLINE, Spawn, spawner, transfer

KEY, OTHER = b"k" * 40, b"o" * 40
ADDRESS = b"10.0.0.1:7000"
ROW = 512

# The frames ------------------------------------------------------------------------------------


def test_two_that_hold_the_key_prove_it() -> None:
    connector = Connector(KEY, ADDRESS)
    listener = Listener(KEY, ADDRESS, connector.hello)
    listener.check(connector.prove(listener.answer))
    assert (len(connector.hello), len(listener.answer)) == (HELLO_BYTES, ANSWER_BYTES)
    assert KEY not in connector.hello + listener.answer


@pytest.mark.parametrize(("key", "address"), [(OTHER, ADDRESS), (KEY, b"10.0.0.2:7000")])
def test_a_listener_of_another_key_or_place_gets_no_proof(key: bytes, address: bytes) -> None:
    connector = Connector(KEY, ADDRESS)
    listener = Listener(key, address, connector.hello)
    with pytest.raises(NotProvenError, match="key"):
        connector.prove(listener.answer)


def test_a_listeners_own_answer_is_no_proof() -> None:
    connector = Connector(KEY, ADDRESS)
    listener = Listener(KEY, ADDRESS, connector.hello)
    with pytest.raises(NotProvenError):
        listener.check(listener.answer[-32:])


def test_a_recorded_proof_is_worth_nothing() -> None:
    connector = Connector(KEY, ADDRESS)
    recorded = connector.prove(Listener(KEY, ADDRESS, connector.hello).answer)
    again = Listener(KEY, ADDRESS, connector.hello)
    with pytest.raises(NotProvenError):
        again.check(recorded)


def test_every_byte_counts() -> None:
    connector = Connector(KEY, ADDRESS)
    for position in range(HELLO_BYTES):
        hello = bytearray(connector.hello)
        hello[position] ^= 1
        with pytest.raises(NotProvenError):
            connector.prove(Listener(KEY, ADDRESS, bytes(hello)).answer)
    listener = Listener(KEY, ADDRESS, connector.hello)
    for position in range(ANSWER_BYTES):
        answer = bytearray(listener.answer)
        answer[position] ^= 1
        with pytest.raises(NotProvenError):
            connector.prove(bytes(answer))


# The connections -------------------------------------------------------------------------------


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with spawner("ucx", cluster_key=KEY) as spawn:
        yield spawn


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_peers, "HANDSHAKE_TIMEOUT", 2.0)


def test_blocks_travel_between_proven_peers(spawn: Spawn) -> None:
    sender, receiver = spawn(64, ROW), spawn(64, ROW)
    transfer(sender, receiver, 1, [1, 5, 2], [7, 8, 9])
    transfer(receiver, sender, 2, [1, 5, 2], [7, 8, 9])
    transfer(sender, receiver, 3, range(64), range(64))
    assert receiver.thread.snapshot().strangers == 0


@pytest.mark.parametrize("key", [OTHER, None])
def test_blocks_do_not_reach_who_cannot_prove_itself(
    spawn: Spawn, short_patience: None, key: bytes | None
) -> None:
    sender = spawn(8, ROW)
    with spawner("ucx", cluster_key=key) as spawn_stranger:
        stranger = spawn_stranger(8, ROW)
        before = stranger.rows.clone()
        stranger.thread.open_grant(1, [3])
        sender.thread.send_blocks(stranger.address, 1, 0, [1], [3])
        assert sender.expect(SendFailed).grant_id == 1
        assert torch.equal(stranger.rows, before)
        assert not stranger.untaken(MessageRefused)
        assert stranger.thread.snapshot().messages_received == 0


@pytest.mark.parametrize("key", [OTHER, None])
def test_strangers_are_hung_up_on_and_counted(
    spawn: Spawn, short_patience: None, key: bytes | None
) -> None:
    sender, receiver = spawn(8, ROW), spawn(8, ROW)
    receiver.thread.open_grant(7, [3])
    with spawner("ucx", cluster_key=key) as spawn_stranger:
        stranger = spawn_stranger(8, ROW)
        stranger.thread.send_blocks(receiver.address, 9, 0, [1], [3])
        deadline = time.monotonic() + DEADLINE
        while receiver.thread.snapshot().strangers == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    transfer(sender, receiver, 1, [1, 2], [4, 5])
    assert receiver.thread.snapshot().strangers == 1


def progress(*ends: UCXTransport, until: float) -> None:
    for end in ends:
        end.progress()
        end.wait(0.001)
    assert time.monotonic() < until, "nothing happened"


@pytest.mark.parametrize("said", [b"", b"x", b"\0" * HELLO_BYTES, b"GET / HTTP/1.1\r\n" * 4096])
def test_noise_in_the_hand_shake(short_patience: None, said: bytes) -> None:
    listener, stranger = UCXTransport("127.0.0.1", cluster_key=KEY), UCXTransport("127.0.0.1")
    endpoint = stranger.connect(listener.address).endpoint
    if said:
        noise = ucx_peers.Request(np.frombuffer(said, np.uint8))
        noise.begin(endpoint.stream_send(noise.array))
    until = time.monotonic() + DEADLINE
    while not listener.num_strangers or endpoint.alive:
        progress(listener, stranger, until=until)
    friend = UCXTransport("127.0.0.1", cluster_key=KEY)
    sent = friend.send(friend.connect(listener.address), 1, np.zeros(100, np.uint8))
    while (message := listener.probe()) is None:
        progress(listener, friend, until=until)
    listener.receive(message, np.zeros(100, np.uint8))
    while not sent.done:
        progress(listener, friend, until=until)
    assert sent.error is None
    for end in (listener, stranger, friend):
        end.shutdown()


def test_a_crowd_of_silent_strangers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "MAX_PROVING", 2)
    listener, crowd = UCXTransport("127.0.0.1", cluster_key=KEY), UCXTransport("127.0.0.1")
    for _ in range(5):
        crowd.connect(listener.address)
    until = time.monotonic() + DEADLINE
    while listener.num_strangers < 3:
        progress(listener, crowd, until=until)
    crowd.shutdown()
    listener.shutdown()


def other_address() -> str:
    """Of this host, not the loopback one; the packets that are meant for it go nowhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has only its loopback address")
        address: str = probe.getsockname()[0]
    return address


def test_without_a_key_a_loopback_end_is_for_this_host_only() -> None:
    listener, stranger = UCXTransport("127.0.0.1"), UCXTransport("127.0.0.1")
    port = listener.address.rpartition(b":")[2]
    address = other_address().encode() + b":" + port  # what other hosts would dial
    connection = stranger.connect(address)
    until = time.monotonic() + DEADLINE
    while not listener.num_strangers or connection.alive:
        progress(listener, stranger, until=until)
    stranger.shutdown()
    listener.shutdown()
