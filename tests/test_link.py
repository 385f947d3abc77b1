"""Links between processes: delivery, noise, keys, and peers that are not there."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from protocol import link
from protocol.errors import ConfigError
from protocol.link import Client, Server, read_cluster_key, write_cluster_key
from protocol.messages import Cancel, Message, RegisterAgain
from protocol.wire import encode

PATIENCE = 30.0  # seconds for what must come
SILENCE = 0.5  # seconds in which what must not come would have come
ANY_PORT = "tcp://127.0.0.1:*"

Opens = Callable[[str, bytes], zmq.asyncio.Socket]


@pytest.fixture
async def open_socket() -> AsyncIterator[Opens]:
    """Raw sockets of peers that do not keep to the protocol."""
    sockets: list[zmq.asyncio.Socket] = []

    def open_one(endpoint: str, identity: bytes) -> zmq.asyncio.Socket:
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(endpoint)
        return socket

    yield open_one
    for opened in sockets:
        opened.close(0)


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    write_cluster_key(tmp_path / "key")
    return read_cluster_key(tmp_path / "key")


async def received(server: Server) -> tuple[bytes, Message]:
    return await asyncio.wait_for(server.receive(), PATIENCE)


async def silent(end: Server | Client) -> bool:
    """Whether nothing arrives."""
    try:
        await asyncio.wait_for(end.receive(), SILENCE)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("encrypted", [False, True])
async def test_there_and_back(encrypted: bool, key: bytes) -> None:
    secret = key if encrypted else None
    server = Server(ANY_PORT, secret)
    client = Client(server.endpoint, "worker-0", secret)
    for number in range(100):
        assert client.send(Cancel(request_id=str(number)))
    for number in range(100):
        assert await received(server) == (b"worker-0", Cancel(request_id=str(number)))
    assert server.send(b"worker-0", RegisterAgain())
    assert await asyncio.wait_for(client.receive(), PATIENCE) == RegisterAgain()
    client.close()
    server.close()


async def test_local_sockets(tmp_path: Path) -> None:
    server = Server(f"ipc://{tmp_path}/s")
    client = Client(server.endpoint, "worker-0")
    client.send(RegisterAgain())
    assert await received(server) == (b"worker-0", RegisterAgain())
    client.close()
    server.close()


async def test_noise_is_counted_and_dropped_and_what_follows_arrives(open_socket: Opens) -> None:
    server = Server(ANY_PORT)
    stranger = open_socket(server.endpoint, b"stranger\xff")
    good = encode(Cancel(request_id="r"))
    noise = ([b"Cancel", b"\xc1"], [b"Cancel"], [b"x"], [b""], [b"Nothing", b""], [*good, b""])
    for frames in noise:
        await stranger.send_multipart(frames)
    await stranger.send_multipart(good)
    assert await received(server) == (b"stranger\xff", Cancel(request_id="r"))
    assert server.dropped == {"malformed": len(noise)}
    server.close()


async def test_an_oversize_frame_costs_its_sender_the_connection_and_nobody_else(
    open_socket: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", 10_000)
    server = Server(ANY_PORT)
    client = Client(server.endpoint, "worker-0")
    await open_socket(server.endpoint, b"big").send_multipart([b"Cancel", b"x" * 10_001])
    assert await silent(server)
    client.send(RegisterAgain())
    assert await received(server) == (b"worker-0", RegisterAgain())
    client.close()
    server.close()


async def test_an_unknown_peer_is_unreachable() -> None:
    server = Server(ANY_PORT)
    assert not server.send(b"nobody", RegisterAgain())
    assert server.dropped == {"unreachable": 1}
    server.close()


async def test_a_full_queue_refuses_and_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HIGH_WATER_MARK", 10)
    monkeypatch.setattr(link, "LINGER_MS", 0)
    client = Client("tcp://127.0.0.1:9", "worker-0")  # nobody listens there
    sent = [client.send(RegisterAgain()) for _ in range(50)]
    assert sent == [True] * sum(sent) + [False] * (50 - sum(sent))
    assert 0 < sum(sent) <= 20
    assert client.dropped == {"unreachable": 50 - sum(sent)}
    client.close()


async def listening_again(endpoint: str) -> Server:
    """A server in the place of one that was closed: ZeroMQ ends that in the background."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return Server(endpoint)
            except ConfigError:
                await asyncio.sleep(0.01)


async def test_a_client_waits_for_its_server_and_finds_it_again(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    client = Client(endpoint, "worker-0")
    client.send(Cancel(request_id="before"))
    server = Server(endpoint)
    assert await received(server) == (b"worker-0", Cancel(request_id="before"))
    server.close()

    async def heartbeats() -> None:
        while True:  # what is sent while the link breaks may be lost
            client.send(RegisterAgain())
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(heartbeats())
    server = await listening_again(endpoint)
    assert await received(server) == (b"worker-0", RegisterAgain())
    beating.cancel()
    client.close()
    server.close()


async def test_a_peer_that_starts_again_takes_its_name_over() -> None:
    server = Server(ANY_PORT)
    for start in range(3):
        client = Client(server.endpoint, "worker-0")
        client.send(Cancel(request_id=str(start)))
        assert await received(server) == (b"worker-0", Cancel(request_id=str(start)))
        assert server.send(b"worker-0", Cancel(request_id=str(start)))
        answer = await asyncio.wait_for(client.receive(), PATIENCE)
        assert answer == Cancel(request_id=str(start))
        client.close()
    server.close()


# Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_key", [False, True])
async def test_strangers_stay_outside(with_key: bool, key: bytes) -> None:
    server = Server(ANY_PORT, key)
    other = zmq.curve_keypair()[1] if with_key else None
    stranger = Client(server.endpoint, "stranger", other)
    stranger.send(RegisterAgain())
    assert await silent(server)
    assert not server.send(b"stranger", RegisterAgain())
    stranger.close()
    server.close()


async def test_a_client_with_a_key_does_not_talk_to_a_server_without(key: bytes) -> None:
    server = Server(ANY_PORT)
    client = Client(server.endpoint, "worker-0", key)
    client.send(RegisterAgain())
    assert await silent(server)
    client.close()
    server.close()


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    before = read_cluster_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(before) == 40
    with pytest.raises(ConfigError, match="cannot write"):
        write_cluster_key(path)
    assert read_cluster_key(path) == before


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_cluster_key(path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 41, b"\xff" * 40, b'"' * 40, None])
def test_what_is_not_a_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.touch(mode=0o600)
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="keygen"):
        read_cluster_key(path)


@pytest.mark.parametrize("endpoint", ["tcp://nowhere", "bogus", "tcp://256.0.0.1:1"])
async def test_endpoints_that_cannot_be(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        Server(endpoint)


async def test_an_address_in_use_is_named() -> None:
    server = Server(ANY_PORT)
    with pytest.raises(ConfigError, match=r"cannot listen on tcp://.* in use"):
        Server(server.endpoint)
    server.close()


async def test_a_local_socket_in_use_is_not_taken_away(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    server = Server(endpoint)
    with pytest.raises(ConfigError, match="another process listens there"):
        Server(endpoint)
    client = Client(endpoint, "worker-0")
    client.send(RegisterAgain())
    assert await received(server) == (b"worker-0", RegisterAgain())
    client.close()
    server.close()


async def test_a_local_socket_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/s")
    server = Server(f"ipc://{tmp_path}/s")
    client = Client(server.endpoint, "worker-0")
    client.send(RegisterAgain())
    assert await received(server) == (b"worker-0", RegisterAgain())
    client.close()
    server.close()


async def test_a_client_refuses_what_is_no_endpoint() -> None:
    with pytest.raises(ConfigError, match="cannot connect"):
        Client("bogus", "worker-0")
