"""A worker's own HTTP port: ``/metrics``, and ``/ready`` with 200 or with 503 and a reason.

Only this process's threads count: a peer or a router that is gone changes nothing here. Both are
served by threads of their own, so a stuck event loop cannot keep the answer back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, start_http_server

from protocol.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STUCK = 3.0  # seconds without a sign of life
LONGER = 4  # a step may take this many times as long as the longest of late


class Transfers(Protocol):
    """What is asked of a TransferThread."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""

    @property
    def stuck_for(self) -> float:
        """Seconds since its last sign of life."""


class Steps(Protocol):
    """What is asked of an EngineThread."""

    @property
    def running_for(self) -> float:
        """Seconds that the step under way has taken."""

    @property
    def longest(self) -> float:
        """Seconds of the longest step of late."""


class Readiness:
    """Whether this worker's threads do their work."""

    def __init__(self, transfers: Transfers, steps: Steps) -> None:
        self._transfers = transfers
        self._steps = steps

    def objection(self) -> str | None:
        """Why the worker cannot serve; None if it can. From any thread."""
        if not self._transfers.alive:
            return "the transfer thread has ended"
        stuck, step = self._transfers.stuck_for, self._steps.running_for
        if stuck > STUCK:
            return f"the transfer thread has been stuck for {stuck:.1f} s"
        if step > max(STUCK, LONGER * self._steps.longest):
            return f"the engine has been in one step for {step:.1f} s"
        return None


def serve_status(host: str, port: int, registry: CollectorRegistry, readiness: Readiness) -> str:
    """Serve both until the process ends; the metrics' URL. Raises ConfigError."""
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    metrics = server.get_app()
    assert metrics is not None
    server.set_app(_with_readiness(metrics, readiness.objection))
    return f"http://{host}:{server.server_port}/metrics"


def _with_readiness(
    metrics: WSGIApplication, objection: Callable[[], str | None]
) -> WSGIApplication:
    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/ready":
            return metrics(environ, start_response)
        reason = objection()
        status = "200 OK" if reason is None else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason or 'ready'}\n".encode()]

    return serve
