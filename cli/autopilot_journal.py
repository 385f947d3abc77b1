"""What the autopilot decided, why, and what came of it: told, counted and remembered.

A JSON line on standard output for each event; Prometheus' series; the last decisions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from planner.autopilot_terms import Decision
from protocol.errors import ConfigError

REMEMBERED = 50  # decisions

Trouble = Literal["waiting", "unreported"]


class Journal:
    """One autopilot's."""

    def __init__(self) -> None:
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

    def trouble(self, kind: Trouble, reason: str) -> None:
        """The router cannot be asked, or takes no report: it shows none of the decisions."""
        _write({"time": _now(), "event": kind, "reason": reason})

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

    def decisions(self) -> list[dict[str, Any]]:
        """The last ones, the newest first. ``outcome`` stays null until ``judged``."""
        return list(self._told.values())[::-1]

    def serve(self, port: int) -> int:
        """``/metrics`` for this host, in a thread; 0: any port. Returns it.

        Raises ConfigError when the port cannot be had.
        """
        try:
            server, _ = start_http_server(port, "127.0.0.1", self.registry)
        except OSError as error:
            raise ConfigError(f"cannot listen on port {port}: {error.strerror}") from error
        return server.server_port


def _fields(decision: Decision) -> dict[str, Any]:
    fields = asdict(decision)
    del fields["at"]  # of a clock that means nothing outside this process
    return fields


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
