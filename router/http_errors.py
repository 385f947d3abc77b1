"""Errors as OpenAI clients expect them: ``{"error": {message, type, param, code}}``.

Raised errors become answers in one place, ``install``; each is counted. A client never sees a
stack trace.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from protocol.errors import InvalidRequestError, KvferryError, OverloadedError
from router.metrics import CLIENT_CLOSED_REQUEST, RouterMetrics

INTERNAL_ERROR = KvferryError("internal error; the server's log has details")

_CODES = {
    401: "invalid_api_key",
    403: "admin_key_required",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
}


def error_body(error: KvferryError) -> dict[str, Any]:
    """The JSON of an error, for an answer or an event of a stream."""
    param = error.param if isinstance(error, InvalidRequestError) else None
    return _body(error.status, str(error), error.code, param)


def invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first thing wrong with a body, under its field's name."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is required"
    return InvalidRequestError(f"{param}: {message}" if param else message, param or None)


def install(app: FastAPI, metrics: RouterMetrics) -> None:
    """Answer every error that a route raises."""

    async def on_kvferry_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, KvferryError)
        metrics.failed(error.status, error.code)
        headers = {}
        if isinstance(error, OverloadedError):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        return JSONResponse(error_body(error), error.status, headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "http_error")
        message = error.detail
        if error.status_code in (404, 405):  # from the routing itself
            message = f"there is no {request.method} {request.url.path}"
        metrics.failed(error.status_code, code)
        body = _body(error.status_code, message, code, None)
        return JSONResponse(body, error.status_code, error.headers)

    async def on_disconnect(_: Request, __: Exception) -> Response:
        metrics.client_left()
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(_: Request, __: Exception) -> Response:  # the server logs the trace
        metrics.failed(INTERNAL_ERROR.status, INTERNAL_ERROR.code)
        return JSONResponse(error_body(INTERNAL_ERROR), INTERNAL_ERROR.status)

    app.add_exception_handler(KvferryError, on_kvferry_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)


def _body(status: int, message: str, code: str, param: str | None) -> dict[str, Any]:
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
