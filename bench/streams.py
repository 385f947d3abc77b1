"""A frugal client of many streams, so that the machine's cores are left to what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 300.0  # seconds for all streams


async def stream_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Send all requests at once; the seconds (``time.perf_counter``) of each one's events.

    ``url`` is the whole address of a route that streams. Raises RuntimeError when an answer is
    anything but 200, and TimeoutError.
    """
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*(_stream(url, body) for body in bodies))


async def _stream(url: str, body: dict[str, Any]) -> list[float]:
    where = urlsplit(url)
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(
            f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
        arrivals = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
        return arrivals
    finally:
        writer.close()
