"""A deployment to measure, on this host, as ``kvferry serve`` starts it."""

from __future__ import annotations

import contextlib
import itertools
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
    """A router and workers, all of them ready; they end with the block.

    ``options`` are further ones of ``kvferry serve``. Raises RuntimeError when they do not get
    ready.
    """
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "serve", "--port", str(port), "--model", model]
    serve = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    asked = dict(itertools.pairwise(options))
    num_workers = sum(int(asked.get(pool, 1)) for pool in ("--prefill", "--decode"))
    deployment = Deployment(f"http://127.0.0.1:{port}", serve.pid)
    try:
        wait_for_workers(deployment.url, num_workers, serve)
        yield deployment
    finally:
        serve.terminate()
        serve.wait()


def wait_for_workers(
    url: str, num_workers: int, serve: subprocess.Popen[bytes] | None = None
) -> None:
    """Until so many are registered. Raises RuntimeError when ``serve`` ends or it takes long."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if serve is not None and serve.poll() is not None:
            raise RuntimeError(f"kvferry serve ended with {serve.returncode}")
        with contextlib.suppress(httpx.TransportError):
            told = httpx.get(f"{url}/admin/workers", timeout=5).json()
            if len(told["workers"]) == num_workers:
                return
        time.sleep(0.02)
    raise RuntimeError(f"not all {num_workers} workers registered")
