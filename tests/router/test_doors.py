"""What keeps strangers out: keys, and no public interface without a key."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli.router import RouterConfig, listen, serve_router
from protocol.errors import ConfigError
from router.api_keys import ApiKeys, read_api_keys


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


def test_a_streams_events_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
