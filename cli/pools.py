"""``kvferry pools``: operate the pools of a running router through its HTTP API."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any

import typer

from cli.options import ApiKey

TIMEOUT = 10.0  # seconds

app = typer.Typer(no_args_is_help=True, help="Operate the pools of a running router.")

Url = Annotated[str, typer.Option(help="The router's HTTP address.")]


@app.callback()
def pools() -> None:
    """Operate the pools of a running router."""


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="The worker's id, as GET /admin/workers shows it.")],
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
) -> None:
    """Let a worker end its work and leave; what it cannot end in time goes on elsewhere."""
    path = f"/admin/workers/{urllib.parse.quote(worker, safe='')}/drain"
    row = _post(url, path, api_key[0] if api_key else None)
    sys.stdout.write(f"{row['id']} is leaving with {row['requests']} requests\n")


def _post(url: str, path: str, api_key: str | None) -> Any:
    """The JSON of the answer. Ends the command with the router's error, or the network's."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} is no http address", param_hint="--url")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url + path, b"", headers, method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        reason = json.load(error)["error"]["message"]
    except urllib.error.URLError as error:
        reason = f"{url}: {error.reason}"
    sys.stderr.write(f"error: {reason}\n")
    raise typer.Exit(1)
