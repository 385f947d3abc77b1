"""``kvferry pools``: operate the pools of a running router through its HTTP API."""

from __future__ import annotations

import sys
import time
import urllib.parse
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cli.admin_client import ask
from cli.options import OperatorKey, RouterUrl
from protocol.messages import Role

POLL = 0.2  # seconds

app = typer.Typer(no_args_is_help=True, help="Operate the pools of a running router.")

Worker = Annotated[str, typer.Argument(help="The worker's id, as GET /admin/workers shows it.")]
Size = Annotated[int, typer.Option(help="Workers that are to serve in this pool.", min=1)]


@app.callback()
def pools() -> None:
    """Operate the pools of a running router."""


@app.command()
def drain(
    worker: Worker,
    url: RouterUrl = "http://127.0.0.1:8000",
    api_key: OperatorKey = None,
) -> None:
    """Let a worker end its work and leave; what it cannot end in time goes on elsewhere."""
    row = _Admin(url, api_key).post(f"workers/{_quoted(worker)}/drain")
    sys.stdout.write(f"{row['id']} is leaving with {row['requests']} requests\n")


@app.command()
def flip(
    worker: Worker,
    role: Annotated[Role, typer.Argument(help="The pool it is to serve in.")],
    url: RouterUrl = "http://127.0.0.1:8000",
    api_key: OperatorKey = None,
) -> None:
    """Let a worker end its work and serve in the other pool, with the weights and KV it has."""
    admin = _Admin(url, api_key)
    admin.post(f"workers/{_quoted(worker)}/role", {"role": role})
    _watch(admin)


@app.command("set")
def resize(
    prefill: Size,
    decode: Size,
    url: RouterUrl = "http://127.0.0.1:8000",
    api_key: OperatorKey = None,
) -> None:
    """Let as many workers as it takes change their pool, one after the other."""
    admin = _Admin(url, api_key)
    admin.post("pools", {"prefill": prefill, "decode": decode})
    _watch(admin)


class _Admin:
    """``/admin`` of one router."""

    def __init__(self, url: str, api_keys: list[str] | None) -> None:
        self._url = url
        self._api_key = api_keys[0] if api_keys else None

    def get(self, path: str) -> Any:
        return ask(self._url, f"/admin/{path}", self._api_key)

    def post(self, path: str, body: object = None) -> Any:
        return ask(self._url, f"/admin/{path}", self._api_key, method="POST", body=body)


def _watch(admin: _Admin) -> None:
    """Show the change under way until its end. An end before its aim ends the command with 1."""
    console = Console()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            pools = admin.get("pools")
            change = pools["change"]
            if change is None:  # the router has been restarted
                _fail("the router has forgotten the change; a worker that was asked goes on")
            if change["state"] != "running":
                break
            live.update(_table(admin.get("workers")["workers"]), refresh=True)
            time.sleep(POLL)
    for step in change["flips"]:
        if step["state"] == "done":
            sys.stdout.write(f"{step['worker']} is {step['role']} after {step['seconds']:.1f} s\n")
    sys.stdout.write(f"{pools['prefill']} prefill and {pools['decode']} decode workers serve\n")
    if change["state"] == "failed":
        _fail(change["reason"])


def _table(workers: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("worker", "role", "state", "next role", "requests"):
        table.add_column(heading)
    for row in workers:
        requests = str(row["requests"])
        table.add_row(row["id"], row["role"], row["state"], row["next_role"] or "", requests)
    return table


def _quoted(worker: str) -> str:
    return urllib.parse.quote(worker, safe="")


def _fail(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}\n")
    raise typer.Exit(1)
