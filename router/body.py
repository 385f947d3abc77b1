"""Reads request bodies: bounded in size and time, then validated."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from router.http_errors import invalid_request
from router.schema_base import Body

LONG_BODY = 65_536  # bytes; a longer body is validated in a thread

B = TypeVar("B", bound=Body)


async def read_body(request: Request, kind: type[B], *, max_bytes: int, seconds: float) -> B:
    """The body as a ``kind``, given ``seconds`` to arrive.

    Raises HTTPException (413, 408), InvalidRequestError and starlette's ClientDisconnect.
    """
    try:
        async with asyncio.timeout(seconds):
            raw = await _read_bounded(request, max_bytes)
    except TimeoutError:
        reason = f"the body did not arrive within {seconds:g} s"
        raise HTTPException(408, reason, {"Connection": "close"}) from None
    try:
        if len(raw) <= LONG_BODY:
            return kind.model_validate_json(raw)
        return await asyncio.to_thread(kind.model_validate_json, raw)
    except ValidationError as error:
        raise invalid_request(error) from error


async def _read_bounded(request: Request, max_bytes: int) -> bytes:
    too_large = HTTPException(413, f"the body is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > max_bytes:  # the server has checked the number
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)
