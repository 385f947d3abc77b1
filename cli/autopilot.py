"""``kvferry autopilot``: keeps a running router's pools right, or says what it would change.

A process of its own over the router's administration: it may end, restart or be replaced without
touching a stream, and its simulations take no time from serving. Every decision and, a cool-down
later, what came of it is a JSON line on standard output.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import mean
from typing import Annotated, Any, Literal

import typer
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from cli.admin_client import fetch
from cli.options import ApiKey, Attainment, RouterUrl, SloTpot, SloTtft
from planner.autopilot import decide, judge, predictor
from planner.autopilot_terms import Decision, Limits, Observation, Pools, State
from planner.fit import observed_profile
from planner.observed import Row, placement_of
from planner.outcome import Slo
from planner.workload import Request
from protocol.errors import ConfigError, KvferryError

COMMAND_TIMEOUT = 60.0  # seconds for --scale-command

Mode = Literal["dry-run", "on"]


def autopilot(
    slo_ttft: SloTtft,
    slo_tpot: SloTpot,
    mode: Annotated[
        Mode, typer.Option(help="Only tell what it would change, or change it.")
    ] = "dry-run",
    router: RouterUrl = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    attainment: Attainment = 0.9,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 5.0,
    cool_down: Annotated[float, typer.Option(help="Seconds between two changes.", min=1)] = 60.0,
    scale_command: Annotated[
        str | None,
        typer.Option(
            help="Adds and removes workers; {prefill} and {decode} are the numbers wanted."
        ),
    ] = None,
    min_workers: Annotated[int, typer.Option(help="With --scale-command.", min=2)] = 2,
    max_workers: Annotated[int, typer.Option(help="With --scale-command.", min=2)] = 8,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port for Prometheus' metrics, of this host.", min=1)
    ] = None,
) -> None:
    """Keep the pools' ratio right for the requests that come. By default it only tells."""
    try:
        limits = Limits(
            Slo(slo_ttft / 1e3, slo_tpot / 1e3, attainment),
            cool_down=cool_down,
            workers=(min_workers, max_workers) if scale_command else None,
        )
        command = _checked(scale_command)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    pilot = Autopilot(router, api_key[0] if api_key else None, mode, limits, command)
    if metrics_port is not None:
        start_http_server(metrics_port, "127.0.0.1", pilot.registry)
    while True:
        pilot.look()
        time.sleep(interval)


class Autopilot:
    """One router's. Trouble with it is told, once while it lasts, and waited out."""

    def __init__(
        self, url: str, api_key: str | None, mode: Mode, limits: Limits, command: Sequence[str]
    ) -> None:
        self._url, self._api_key, self._mode = url, api_key, mode
        self._limits, self._command = limits, command
        self._state = State.at_start(time.monotonic(), limits)
        self._trouble: str | None = None
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

    def look(self) -> None:
        """Observe, judge former decisions, decide, and carry it out."""
        try:
            self._look()
        except KvferryError as error:
            if str(error) != self._trouble:
                _tell("waiting", reason=str(error))
            self._trouble = str(error)
        else:
            self._trouble = None

    def _look(self) -> None:
        workers = self._ask("/admin/workers")["workers"]
        told = self._ask(f"/admin/workload?seconds={self._limits.window:g}")["rows"]
        seen = observe(workers, [Row(*row) for row in told], self._ask("/admin/pools")["change"])
        now = time.monotonic()
        self._state, judged = judge(seen, self._state, now, self._limits)
        for one in judged:
            self._measured(one)

        def predict(requests: Sequence[Request], pools: Pools) -> float:
            placement = placement_of(workers, mean(request.prompt_tokens for request in requests))
            return predictor(observed_profile(workers), placement, self._limits.slo)(
                requests, pools
            )

        self._state, decision = decide(seen, self._state, now, self._limits, predict)
        if decision is not None:
            self._decided(decision)

    def _ask(self, path: str, method: str = "GET", body: object = None) -> Any:
        return fetch(self._url, path, self._api_key, method=method, body=body)

    def _decided(self, decision: Decision) -> None:
        done, trouble = self._mode == "on", None
        if done:
            try:
                self._change(decision)
            except KvferryError as error:
                done, trouble = False, str(error)
        _tell("decision", **_fields(decision), done=done, error=trouble)
        self._decisions.labels(decision.kind, str(done).lower()).inc()
        if decision.predicted is not None:
            self._attainment.labels("predicted").set(decision.predicted)

    def _measured(self, decision: Decision) -> None:
        _tell("outcome", **_fields(decision))
        if decision.outcome is not None:
            self._attainment.labels("measured").set(decision.outcome)

    def _change(self, decision: Decision) -> None:
        """Roles by the router; numbers by the operator's command."""
        wanted = decision.wanted
        if wanted.num_workers == decision.present.num_workers:
            self._ask("/admin/pools", "POST", asdict(wanted))
            return
        words = [word.format(**asdict(wanted)) for word in self._command]
        try:
            subprocess.run(words, check=True, timeout=COMMAND_TIMEOUT, capture_output=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise KvferryError(f"the scale command failed: {error}") from error


def observe(
    workers: Sequence[dict[str, Any]], rows: Sequence[Row], change: dict[str, Any] | None
) -> Observation:
    """What the router's answers say, for a decision."""
    serving = [worker for worker in workers if worker["state"] == "serving"]
    prefill = [worker for worker in serving if worker["role"] == "prefill"]
    loads = [worker["load"] for worker in prefill]
    waits = [
        load["waiting_tokens"] / load["prefill_tokens_per_second"]
        for load in loads
        if load["prefill_tokens_per_second"]
    ]
    return Observation(
        Pools(len(prefill), len(serving) - len(prefill)),
        rows,
        wait=min(waits, default=0.0),
        num_open=sum(worker["requests"] for worker in workers),
        changing=change is not None and change["state"] == "running",
    )


def _checked(command: str | None) -> list[str]:
    words = shlex.split(command or "")
    try:
        for word in words:
            word.format(prefill=1, decode=1)
    except (KeyError, IndexError, ValueError) as error:
        known = "{prefill} and {decode}"
        raise ConfigError(f"--scale-command knows only {known}: {command!r}") from error
    return words


def _fields(decision: Decision) -> dict[str, Any]:
    fields = asdict(decision)
    del fields["at"]  # of a clock that means nothing outside this process
    return fields


def _tell(event: str, **fields: Any) -> None:
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
