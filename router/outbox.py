"""What the dispatcher has for a request's reader: tokens until they are taken, or an error.

Chunks that wait are one chunk, so a reader that is late, be it for its slow client or because the
router has much to do, catches up with a single event.
"""

from __future__ import annotations

import asyncio

from protocol.errors import KvferryError
from router.generation import TokenChunk


class Outbox:
    """Of one request, with one reader. Bounded by the request's ``max_tokens``."""

    def __init__(self) -> None:
        self._chunk: TokenChunk | None = None
        self._error: KvferryError | None = None
        self._arrival: asyncio.Future[None] | None = None  # while the reader waits

    def put(self, item: TokenChunk | KvferryError) -> None:
        """More tokens, or the error that ends the request."""
        if isinstance(item, KvferryError):
            self._error = item
        elif self._chunk is None:
            self._chunk = item
        else:
            self._chunk = self._chunk.followed_by(item)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def take(self) -> TokenChunk | None:
        """The tokens that are there, if any. Raises the error once they are taken."""
        chunk, self._chunk = self._chunk, None
        if chunk is None and self._error is not None:
            raise self._error
        return chunk

    async def get(self) -> TokenChunk:
        """The next tokens, as many as there are. Raises the error once they are taken."""
        while (chunk := self.take()) is None:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return chunk
