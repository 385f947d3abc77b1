"""A deployment to measure, on this host, as ``kvferry serve`` starts it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from tests.stack import free_port

START_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Deployment:
    """Serving at ``url``."""

    url: str
    pid: int  # of ``kvferry serve``, whose children are the router and the workers


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[Deployment]:
    """Both pools, ready; they end with the block. Raises RuntimeError when they do not get ready.

    ``options`` are further ones of ``kvferry serve``.
    """
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "serve", "--port", str(port), "--model", model]
    serve = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deployment = Deployment(f"http://127.0.0.1:{port}", serve.pid)
    try:
        _wait_until_ready(deployment.url, serve)
        yield deployment
    finally:
        serve.terminate()
        serve.wait()


def _wait_until_ready(url: str, serve: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if serve.poll() is not None:
            raise RuntimeError(f"kvferry serve ended with {serve.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.02)
    raise RuntimeError("the deployment did not get ready")
