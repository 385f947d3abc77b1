"""Which addresses a process listens on and gives to others."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkerAddresses:
    """Where a worker's peers find it."""

    host: str  # of the data plane and the metrics
    control: str  # ZMQ endpoint to bind; without a port, one is chosen at bind time


def worker_addresses(
    router: str, host: str | None, worker_id: str, control_port: int = 0
) -> WorkerAddresses:
    """Derive a worker's addresses from its router's endpoint.

    Beside a router on a Unix socket the worker stays on this host. Otherwise it listens on
    ``host``, by default the address from which the router is reached, at ``control_port``, or any
    free one if that is 0. Raises ConfigError when nobody else could connect to that address.
    """
    url = urlsplit(router)
    if url.scheme == "ipc":
        directory = router.removeprefix("ipc://").rpartition("/")[0]
        return WorkerAddresses(host or "127.0.0.1", f"ipc://{directory}/{worker_id}.sock")
    if url.scheme != "tcp" or url.hostname is None or url.port is None:
        raise ConfigError(f"--router {router}: expected tcp://HOST:PORT or ipc://PATH")
    host = host or _address_towards(url.hostname, url.port)
    try:
        resolved = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError as error:
        raise ConfigError(f"--host {host}: {error}") from error
    if resolved.is_unspecified:
        raise ConfigError(f"--host {host}: peers cannot connect to it; give this host's address")
    return WorkerAddresses(host, f"tcp://{host}:{control_port or '*'}")


def is_local(endpoint: str) -> bool:
    """Whether only processes on this host can reach a ZMQ endpoint."""
    url = urlsplit(endpoint)
    if url.scheme == "ipc":
        return True
    return is_loopback(url.hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a name or address leads to this host alone."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback
    except OSError:
        return False


def _address_towards(host: str, port: int) -> str:
    """The local address from which packets to ``host`` leave; sends none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"--router host {host}: {error}") from error
    return address
