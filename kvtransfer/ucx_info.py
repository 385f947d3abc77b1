"""Which UCX is in use and what it can do, in words for people and for ``--require-transport``."""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import re
import socket
import sys
from pathlib import Path

from protocol.errors import ConfigError

# With peer error handling UCX leaves these out: they cannot tell that the other side has died.
_UNUSED = {"self", "sysv", "posix", "cma", "xpmem", "knem"}
_FAMILIES = {"rdma": ("rc_", "dc_", "ud_"), "cuda": ("cuda_", "gdr_copy")}

_TRANSPORTS_FIELD = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_CLIENT_ADDRESS_FIELD = 1 << 0  # UCP_CONN_REQUEST_ATTR_FIELD_CLIENT_ADDR
_MAX_LANES = 16
_CONNECTED = {"01", "08"}  # in /proc/net/tcp: established, and closed by the peer alone
NOBODY = "0.0.0.0"  # noqa: S104 - an address that is never taken for this host


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t of UCX 1.12 and later; only ``entries`` and its sizes are used."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_address", ctypes.c_char * 128),
        ("remote_address", ctypes.c_char * 128),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class _ConnectionAttributes(ctypes.Structure):
    """ucp_conn_request_attr_t of UCX 1.12 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("client_address", ctypes.c_ubyte * 128),  # struct sockaddr_storage
        ("client_id", ctypes.c_uint64),
    )


def available(context_info: str) -> list[str]:
    """``transport/device`` of every wire a UCX context can use, from its own description."""
    found = re.findall(r"flags \S+ (\S+)/(\S+)", context_info)
    return sorted({f"{name}/{device}" for name, device in found if name not in _UNUSED})


def describe(version: tuple[int, int, int], transports: list[str]) -> str:
    """One line: version, where the library came from, and its transports."""
    number = ".".join(map(str, version))
    return f"UCX {number} ({library_path()}): {' '.join(transports) or 'none'}"


def endpoint_lanes(handle: int) -> str:
    """The wires of one endpoint, such as ``tcp/eth0 tcp/lo``, or ``""`` when UCX will not say."""
    entries = (_TransportEntry * _MAX_LANES)()
    attributes = _EndpointAttributes(
        field_mask=_TRANSPORTS_FIELD,
        entries=entries,
        num_entries=_MAX_LANES,
        entry_size=ctypes.sizeof(_TransportEntry),
    )
    query = ctypes.CDLL(library_path()).ucp_ep_query
    if query(ctypes.c_void_p(handle), ctypes.byref(attributes)) != 0:
        return ""
    used = entries[: attributes.num_entries]
    # the lane that set the connection up names no device
    return " ".join(
        sorted({f"{e.transport.decode()}/{e.device.decode()}" for e in used if e.device})
    )


def peer_host(connection_request: int, port: int) -> str:
    """From where somebody connects to the listener of ``port``.

    UCX does not always say. Then the kernel does, of everybody who is connected: the answer is
    some other host if there is one among them, or else this one; ``0.0.0.0`` if there is nobody.
    """
    attributes = _ConnectionAttributes(field_mask=_CLIENT_ADDRESS_FIELD)
    query = ctypes.CDLL(library_path()).ucp_conn_request_query
    if query(ctypes.c_void_p(connection_request), ctypes.byref(attributes)) != 0:
        hosts = connected_hosts(port)
        others = [host for host in hosts if not is_loopback(host)]
        return [*others, *hosts, NOBODY][0]
    address = bytes(attributes.client_address)
    family = int.from_bytes(address[:2], sys.byteorder)
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, address[8:24])
    return socket.inet_ntop(socket.AF_INET, address[4:8])


def connected_hosts(port: int) -> list[str]:
    """The hosts at the other ends of a port's TCP connections, by the kernel's tables."""
    hosts = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, here, there, state, *_ = line.split()
            if state in _CONNECTED and int(here.rpartition(":")[2], 16) == port:
                words = bytes.fromhex(there.partition(":")[0])  # of 32 bits, in the host's order
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                hosts.append(socket.inet_ntop(family, address))
    return hosts


def is_loopback(host: str) -> bool:
    """Whether an address is this host's own, IPv4 in IPv6 included."""
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@functools.cache
def library_path() -> str:
    """The libucp this process has loaded."""
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"/\S*libucp\.so\S*", maps)
    return found[0] if found else "libucp.so.0"


def check_transport(required: str, description: str) -> None:
    """Raise ConfigError unless the description names ``required``.

    ``required`` is the beginning of a UCX transport's name (``rc``, ``cuda_ipc``, ``tcp``), or a
    family: ``rdma`` or ``cuda``.
    """
    prefixes = _FAMILIES.get(required, (required,))
    if any(name.startswith(prefixes) for name in description.rpartition("): ")[2].split()):
        return
    raise ConfigError(
        f"--require-transport {required}: this process has {description}. UCX_TLS may leave it "
        "out, or the device may be missing (see ucx_info -d). The UCX that pip installs (libucx) "
        "is built without verbs: for RDMA install the system's UCX and set "
        "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true"
    )
