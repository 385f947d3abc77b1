"""An answer as server-sent events.

A stream ends in exactly one of three ways: what its ``Telling`` says at the end, what it says of
an error, or the client's leaving. Either way its pieces are closed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from protocol.errors import KvferryError
from router.http_errors import INTERNAL_ERROR
from router.metrics import RouterMetrics
from router.output import Piece
from router.stream import while_connected

# Some clients split a stream into lines as Unicode does, not as server-sent events do.
UNICODE_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Telling(Protocol):
    """How an endpoint words an answer in events. Each method gives the bytes of some."""

    def begin(self) -> Sequence[bytes]:
        """Before any piece."""
        ...

    def push(self, piece: Piece) -> Sequence[bytes]:
        """New output."""
        ...

    def end(self) -> Sequence[bytes]:
        """After the last piece."""
        ...

    def fail(self, error: KvferryError) -> Sequence[bytes]:
        """In place of the rest."""
        ...


class EventStream(Response):
    """The answer as its pieces come.

    ``first`` was awaited before, so that what fails before any token is answered with its status.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self,
        telling: Telling,
        first: Piece,
        pieces: AsyncGenerator[Piece, None],
        metrics: RouterMetrics,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._telling = telling
        self._first = first
        self._pieces = pieces
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end or until the client goes."""
        async with aclosing(self._pieces):
            try:
                await while_connected(receive, self._write(send))
            except ClientDisconnect:  # no answer can follow the one that began
                self._metrics.client_left()

    async def _write(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        telling = self._telling
        try:
            await send(_body((*telling.begin(), *telling.push(self._first)), more_body=True))
            async for piece in self._pieces:
                events = telling.push(piece)
                if events:
                    await send(_body(events, more_body=True))
            last = telling.end()
        except KvferryError as error:
            self._metrics.failed(error.status, error.code)
            last = telling.fail(error)
        except Exception:  # a bug: the client is told so; it is counted and logged further up
            await send(_body(telling.fail(INTERNAL_ERROR), more_body=False))
            raise
        await send(_body(last, more_body=False))


def server_sent(content: dict[str, Any], name: str = "") -> bytes:
    """One event, with a name if it has one."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {event_json(content)}\n\n".encode()


def event_json(content: dict[str, Any]) -> str:
    """JSON that an event may hold."""
    text = _JSON.encode(content)
    return text if text.isascii() else text.translate(UNICODE_LINE_ENDS)


def _body(events: Sequence[bytes], *, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": b"".join(events), "more_body": more_body}
