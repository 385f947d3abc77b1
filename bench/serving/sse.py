"""Server-sent events from bytes, however the network cuts them. No I/O, no clock.

Written to WHATWG's HTML standard, "Server-sent events", of which OpenAI's endpoints use the field
``data``.
"""

from __future__ import annotations

MAX_EVENT = 1 << 20  # bytes; more is no event of an OpenAI endpoint


class SSEError(Exception):
    """The stream is not what the standard says."""


class SSEParser:
    """``feed`` bytes, get the data of the events that they end."""

    def __init__(self) -> None:
        self._tail = b""  # a line that has not ended
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of each event that ends here. Raises SSEError on one without bound."""
        lines = (self._tail + chunk).split(b"\n")
        self._tail = lines.pop()
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
            elif line.startswith(b"data:"):
                value = line[5:]
                self._data.append(value.removeprefix(b" "))
                self._size += len(line)
        if self._size + len(self._tail) > MAX_EVENT:
            raise SSEError(f"an event of more than {MAX_EVENT} bytes")
        return events

    @property
    def inside_event(self) -> bool:
        """Whether the stream, ended here, is cut within an event."""
        return bool(self._tail or self._data)
