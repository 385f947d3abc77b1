"""What keeps strangers out: keys, bounds on a request's head, no public interface without a key."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.router import RouterConfig, listen, serve_router
from protocol.errors import ConfigError
from router import http_protocol
from router.api_keys import ApiKeys, read_api_keys
from tests.router.conftest import PATIENCE, Router


def test_each_of_the_keys_is_accepted_and_nothing_else() -> None:
    keys = ApiKeys(["one", "two"])
    assert keys
    one, two = keys.client("Bearer one"), keys.client("bearer two ")
    assert one
    assert two
    assert one != two
    for wrong in ("", "one", "Bearer", "Bearer ", "Bearer on", "Bearer onet", "Basic one"):
        assert keys.client(wrong) is None


def test_without_keys_everybody_is_let_in() -> None:
    assert not ApiKeys()
    assert ApiKeys().client("") is not None


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("# clients\nfirst\n\n  second\n")
    assert read_api_keys(path) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("key", 0o640, "chmod 600"),
        ("# none\n", 0o600, "holds no API key"),
        ("a b\n", 0o600, "holds no spaces"),
        (None, 0o600, "no API keys in"),
    ],
)
def test_bad_files_of_keys(tmp_path: Path, content: str | None, mode: int, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        read_api_keys(path)


async def test_a_public_interface_needs_a_key() -> None:
    config = RouterConfig("demo", None, "0.0.0.0", 0, "ipc:///nowhere/router.sock")
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reachable from other hosts.*--insecure"):
        await serve_router(config)


def exchange(router: Router, sent: bytes) -> bytes:
    """What the router says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", router.port), PATIENCE) as connection:
        connection.sendall(sent)
        said = b""
        try:
            while part := connection.recv(65_536):
                said += part
        except ConnectionResetError:  # it closed with bytes of ours unread
            pass
        return said


@pytest.mark.parametrize(
    "part", [b"GET /" + b"x" * 300_000, b"GET / HTTP/1.1\r\nA: " + b"x" * 300_000]
)
def test_an_endless_head_is_cut(router: Router, part: bytes) -> None:
    assert exchange(router, part).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"]
)
def test_a_head_that_does_not_arrive(
    start: Callable[..., Router], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.3)
    said = exchange(start(), sent)
    assert b"HTTP/1.1 408 " in said
    assert (b"HTTP/1.1 200 " in said) == (b"\r\n\r\n" in sent)


def test_a_streams_events_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
