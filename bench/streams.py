"""A frugal client of many streams, so that the machine's cores are left to what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 300.0  # seconds for all streams


def once(_: bytes) -> int:
    """An event's time is noted once."""
    return 1


async def stream_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Send all requests at once; the seconds (``time.perf_counter``) of each one's events.

    ``url`` is the whole address of a route that streams. Raises RuntimeError when an answer is
    anything but 200, and TimeoutError.
    """
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*(stream(url, body) for body in bodies))
    for status, _ in answers:
        if status != 200:
            raise RuntimeError(f"{url} answered {status}")
    return [arrivals for _, arrivals in answers]


async def stream(
    url: str, body: dict[str, Any], times: Callable[[bytes], int] = once
) -> tuple[int, list[float]]:
    """Send one request; the answer's status and the times of its events.

    ``times`` says how often an event's time is noted. An event that tells of an error makes the
    status 500.
    """
    where = urlsplit(url)
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(
            f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        status = int((await reader.readline()).split()[1])
        arrivals: list[float] = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                arrivals += [time.perf_counter()] * times(line)
            if line.startswith(b'data: {"error"'):
                status = 500
        return status, arrivals
    finally:
        writer.close()
