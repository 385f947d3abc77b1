"""Numbers in a URL's query."""

from __future__ import annotations

import math

from starlette.requests import Request

from protocol.errors import InvalidRequestError


def number(request: Request, name: str, default: float, *, least: float) -> float:
    """A finite number of the query. Raises InvalidRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not least <= found < math.inf:
        raise InvalidRequestError(f"{name} is {text!r}, not a number of at least {least:g}", name)
    return found
