"""What the autopilot decided, why, and what came of it: told, counted and remembered.

A JSON line on standard output for each event; Prometheus' series; the last decisions as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from threading import Thread
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from planner.autopilot_terms import Decision
from protocol.errors import ConfigError

REMEMBERED = 200  # decisions

Mode = Literal["dry-run", "on"]


class Journal:
    """One autopilot's."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._told: dict[float, dict[str, Any]] = {}  # by when it was decided, the oldest first
        self.registry = CollectorRegistry()
        self._decisions = Counter(
            "kvferry_autopilot_decisions",
            "Decisions, by kind and by whether they were carried out",
            ("kind", "done"),
            registry=self.registry,
        )
        self._attainment = Gauge(
            "kvferry_autopilot_attainment",
            "Share of requests within the SLO after the last decision, predicted and then measured",
            ("is",),
            registry=self.registry,
        )

    def waiting(self, reason: str) -> None:
        """Nothing can be decided."""
        _write({"time": _now(), "event": "waiting", "reason": reason})

    def decided(self, decision: Decision, done: bool, error: str | None) -> None:
        """A decision, and whether it was carried out."""
        told = {"time": _now(), **_fields(decision), "done": done, "error": error}
        self._told[decision.at] = told
        while len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]
        _write({"event": "decision", **told})
        self._decisions.labels(decision.kind, str(done).lower()).inc()
        if decision.predicted is not None:
            self._attainment.labels("predicted").set(decision.predicted)

    def judged(self, decision: Decision) -> None:
        """What came of a decision."""
        if decision.at in self._told:
            self._told[decision.at] |= {"outcome": decision.outcome, "judged": _now()}
        _write({"time": _now(), "event": "outcome", **_fields(decision)})
        if decision.outcome is not None:
            self._attainment.labels("measured").set(decision.outcome)

    def decisions(self) -> dict[str, Any]:
        """The last ones, the newest first. ``outcome`` stays null until ``judged``."""
        told = list(self._told.values())
        return {"mode": self._mode, "decisions": told[::-1]}

    def serve(self, port: int) -> int:
        """``/metrics`` and ``/decisions`` for this host, in a thread; 0: any port. Returns it.

        Raises ConfigError when the port cannot be had.
        """
        metrics = make_wsgi_app(self.registry)

        def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/decisions":
                start("200 OK", [("Content-Type", "application/json")])
                return [json.dumps(self.decisions()).encode()]
            page: Iterable[bytes] = metrics(environ, start)
            return page

        try:
            server = make_server("127.0.0.1", port, app, handler_class=_Quiet)
        except OSError as error:
            raise ConfigError(f"cannot listen on port {port}: {error.strerror}") from error
        Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port


class _Quiet(WSGIRequestHandler):
    timeout = 5.0  # seconds for a request: one that never ends would keep the others out

    def log_message(self, *_: object) -> None:
        """Standard output is the journal's, and nobody reads who scraped."""


def _fields(decision: Decision) -> dict[str, Any]:
    fields = asdict(decision)
    del fields["at"]  # of a clock that means nothing outside this process
    return fields


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
