"""HTTP/1.1 to one endpoint: a POST whose answer is told in pieces as they arrive.

On httptools, the parser that uvicorn uses, straight on asyncio's transports: a load generator
that shares the machine with what it measures must leave it the processor.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from protocol.errors import ConfigError


class ConnectionLostError(Exception):
    """The peer closed the connection, or broke HTTP, before the answer ended."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the answer's body, and the time.perf_counter() at which they came."""

    body: bytes
    at: float


class Connection(asyncio.Protocol):
    """One connection. One request at a time."""

    def __init__(self) -> None:
        self.status = 0
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()  # None: the end, or _failure
        self._complete = False
        self._framed = False  # the answer says itself where it ends
        self._failure: Exception | None = None
        self._at = 0.0

    def start(self, request: bytes) -> None:
        """Send a whole request."""
        assert self._transport is not None
        self.status, self._complete, self._framed, self.reusable = 0, False, False, False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The body's pieces; ``status`` is set before the first. Raises ConnectionLostError."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._failure is not None:
            raise ConnectionLostError(str(self._failure)) from self._failure

    @property
    def answering(self) -> bool:
        """Whether any of the answer has come."""
        return self.status != 0

    def close(self) -> None:
        """Drop the connection, and with it a request under way."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit it

    def data_received(self, data: bytes) -> None:
        """Some bytes of the answer."""
        self._at = time.perf_counter()
        if self._parser is None or self._complete:
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone, which is also how an answer without a length ends."""
        self.reusable = False
        if self._parser is None or self._complete:
            return
        if exc is None and self.status and not self._framed:
            self._complete = True
            self._pieces.put_nowait(None)
        else:
            self._fail(exc or ConnectionError("the connection was closed before the answer ended"))

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self._pieces.put_nowait(None)

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        """The status is known. An empty piece tells it, for answers without a body."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._pieces.put_nowait(Piece(b"", self._at))

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._pieces.put_nowait(Piece(body, self._at))

    def on_message_complete(self) -> None:
        """The answer has ended as it should."""
        assert self._parser is not None
        self._complete = True
        self.reusable = self._parser.should_keep_alive()
        self._pieces.put_nowait(None)


class Endpoint:
    """Opens connections to a base address and keeps idle ones for the next request."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            where = urlsplit(url)
            port = where.port or (443 if where.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}") from error
        if where.scheme not in ("http", "https") or where.hostname is None:
            raise ConfigError(f"{url!r} is no http address")
        if where.username is not None:
            raise ConfigError("the address has a user in it; an endpoint takes an API key")
        self._host, self._port = where.hostname, port
        self._ssl = ssl.create_default_context() if where.scheme == "https" else None
        self._base = where.path.rstrip("/").removesuffix("/v1")
        self._head = f"Host: {where.netloc}\r\nAccept: */*\r\n"
        if api_key is not None:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []

    def post(self, path: str, body: bytes) -> AsyncGenerator[tuple[int, Piece], None]:
        """The answer to a JSON body, as (status, piece); the first piece is empty.

        A connection that the endpoint closed while it was idle is replaced by a new one. Raises
        OSError when there is none to be had, ConnectionLostError when it goes.
        """
        return self._exchange(self._request("POST", path, body))

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError, ConnectionLostError."""
        status, parts = 0, []
        async for answered, piece in self._exchange(self._request("GET", path, b"")):
            status = answered
            parts.append(piece.body)
        return status, b"".join(parts)

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes) -> AsyncGenerator[tuple[int, Piece], None]:
        while True:
            reused = self._take_idle()
            connection = reused or await self._connect()
            connection.start(request)
            try:
                async for piece in connection.pieces():
                    yield connection.status, piece
            except ConnectionLostError:
                if reused is not None and not connection.answering:
                    continue
                raise
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            return

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            Connection, self._host, self._port, ssl=self._ssl
        )
        return connection

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body
