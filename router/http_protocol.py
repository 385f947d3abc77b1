"""uvicorn's HTTP protocol with bounds on what comes before a body: its size and its time.

``router.body`` bounds the bodies. Between requests uvicorn's keep-alive time-out holds. Each
request knows when its first byte came (``first_byte_at``): a router that is late to read it counts
the time that it lay in the kernel.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Any

from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_TIMEOUT = 30.0  # seconds from the connection, or a later request's first byte
FIRST_BYTE_AT = "first_byte_at"  # in a request's state
CLOCK_MONOTONIC_COARSE = 6  # as linux/time.h says; the kernel's own clock for what arrives
KERNEL_TICK = time.clock_getres(CLOCK_MONOTONIC_COARSE)  # seconds: 1 to 10 ms
LAST_DATA_RECV = struct.Struct("=52xI")  # of tcp_info in linux/tcp.h; milliseconds ago


def first_byte_at(request: Request) -> float:
    """When the request's first byte came, in monotonic seconds: two kernel ticks late at most."""
    at: float = request.scope["state"][FIRST_BYTE_AT]
    return at


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A head that is too long or too late ends it with 431 or 408."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None  # runs while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self.scope["state"][FIRST_BYTE_AT] = time.monotonic() - self._seconds_unread()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._end_head()
        super().on_headers_complete()

    def _seconds_unread(self) -> float:
        """How long what was read last had lain in the kernel, at least."""
        connection = self.transport.get_extra_info("socket")
        size = LAST_DATA_RECV.size
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        milliseconds: int = LAST_DATA_RECV.unpack(info)[0]
        return max(0.0, milliseconds * 1e-3 - KERNEL_TICK)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._refuse, b"408 Request Timeout")

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()
