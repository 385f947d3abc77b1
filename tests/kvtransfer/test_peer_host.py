"""From where peers come, when UCX will not say: the kernel's own tables."""

from __future__ import annotations

import socket

import pytest

from kvtransfer.ucx_info import connected_hosts, is_loopback


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_connected_hosts(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert connected_hosts(port) == []
        with socket.create_connection((host, port)):
            assert connected_hosts(port) == [host]


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1", False),
    ],
)
def test_is_loopback(host: str, ours: bool) -> None:
    assert is_loopback(host) is ours
