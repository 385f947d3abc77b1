"""Where a worker listens, and what it refuses to tell others."""

from __future__ import annotations

import pytest

from cli.addresses import is_local, worker_addresses
from protocol.errors import ConfigError


def test_beside_a_router_on_a_socket_the_worker_stays_on_this_host() -> None:
    addresses = worker_addresses("ipc:///run/kvferry/router.sock", None, "d0")
    assert addresses.host == "127.0.0.1"
    assert addresses.control == "ipc:///run/kvferry/d0.sock"


def test_over_tcp_the_address_is_the_one_that_reaches_the_router() -> None:
    addresses = worker_addresses("tcp://127.0.0.1:8100", None, "d0")
    assert addresses.host == "127.0.0.1"
    assert addresses.control == "tcp://127.0.0.1:*"
    assert worker_addresses("tcp://127.0.0.1:8100", "127.0.0.2", "d0").host == "127.0.0.2"
    fixed = worker_addresses("tcp://127.0.0.1:8100", None, "d0", 8201)
    assert fixed.control == "tcp://127.0.0.1:8201"


@pytest.mark.parametrize("host", ["0.0.0.0", "no.such.host.invalid"])
def test_an_address_nobody_can_connect_to_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        worker_addresses("tcp://127.0.0.1:8100", host, "d0")


@pytest.mark.parametrize("router", ["127.0.0.1:8100", "tcp://127.0.0.1", "http://a:1", "tcp://:1"])
def test_a_malformed_router_endpoint_is_refused(router: str) -> None:
    with pytest.raises(ConfigError, match="--router"):
        worker_addresses(router, None, "d0")


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("ipc:///run/router.sock", True),
        ("tcp://127.0.0.1:8100", True),
        ("tcp://localhost:8100", True),
        ("tcp://0.0.0.0:8100", False),
        ("tcp://10.0.0.1:8100", False),
    ],
)
def test_only_this_hosts_endpoints_are_local(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) == local
