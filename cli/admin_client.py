"""A running router's administration, asked from the command line."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from typing import Any

import typer

from protocol.errors import KvferryError

TIMEOUT = 10.0  # seconds


def ask(
    url: str, path: str, api_key: str | None, *, method: str = "GET", body: object = None
) -> Any:
    """The JSON of the answer. Ends the command with the router's error, or the network's."""
    try:
        return fetch(url, path, api_key, method=method, body=body)
    except KvferryError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error


def fetch(
    url: str, path: str, api_key: str | None, *, method: str = "GET", body: object = None
) -> Any:
    """The JSON of the answer. Raises KvferryError with the router's reason, or the network's."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} is no http address")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, content, headers, method=method)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise KvferryError(json.load(error)["error"]["message"]) from error
    except urllib.error.URLError as error:
        raise KvferryError(f"{url}: {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise KvferryError(f"{url} gave no answer: {error!r}") from error
