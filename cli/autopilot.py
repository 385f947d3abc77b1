"""``kvferry autopilot``: keeps a running router's pools right, or says what it would change.

A process of its own over the router's administration: it may end, restart or be replaced without
touching a stream, and its simulations take no time from serving.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Annotated, Any, Literal

import typer

from cli.admin_client import fetch
from cli.autopilot_journal import Journal, Trouble
from cli.options import Attainment, OperatorKey, RouterUrl, SloTpot, SloTtft
from cli.scaling import Scale, chosen_scale
from planner.autopilot import decide, judge, predictor
from planner.autopilot_terms import Decision, Limits, Observation, Pools, State
from planner.fit import observed_profile
from planner.observed import Row, placement_of
from planner.outcome import Slo
from planner.workload import Request
from protocol.errors import ConfigError, KvferryError

Mode = Literal["dry-run", "on"]


def autopilot(
    slo_ttft: SloTtft,
    slo_tpot: SloTpot,
    mode: Annotated[
        Mode, typer.Option(help="Only tell what it would change, or change it.")
    ] = "dry-run",
    router: RouterUrl = "http://127.0.0.1:8000",
    api_key: OperatorKey = None,
    attainment: Attainment = 0.9,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 5.0,
    cool_down: Annotated[float, typer.Option(help="Seconds between two changes.", min=1)] = 60.0,
    scale_command: Annotated[
        str | None,
        typer.Option(
            help="Adds and removes workers; {prefill} and {decode} are the numbers wanted."
        ),
    ] = None,
    kubernetes_prefill: Annotated[
        str | None,
        typer.Option(
            help="Adds and removes prefill workers: deployments/NAME or statefulsets/NAME."
        ),
    ] = None,
    kubernetes_decode: Annotated[
        str | None, typer.Option(help="The same for decode workers.")
    ] = None,
    min_workers: Annotated[int, typer.Option(help="Where workers are added.", min=2)] = 2,
    max_workers: Annotated[int, typer.Option(help="Where workers are added.", min=2)] = 8,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of /metrics, for this host.", min=1, max=65535),
    ] = None,
) -> None:
    """Keep the pools' ratio right for the requests that come. By default it only tells."""
    journal = Journal()
    try:
        scale = chosen_scale(scale_command, kubernetes_prefill, kubernetes_decode)
        limits = Limits(
            Slo(slo_ttft / 1e3, slo_tpot / 1e3, attainment),
            cool_down=cool_down,
            workers=(min_workers, max_workers) if scale else None,
        )
        if metrics_port is not None:
            journal.serve(metrics_port)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    key = api_key[0] if api_key else None
    pilot = Autopilot(router, key, mode, limits, journal, scale, interval)
    while True:
        pilot.look()
        time.sleep(interval)


class Autopilot:
    """One router's. Trouble with it is told, once while it lasts, and waited out."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        mode: Mode,
        limits: Limits,
        journal: Journal,
        scale: Scale | None,
        interval: float,
    ) -> None:
        self._url, self._api_key, self._mode = url, api_key, mode
        self._limits, self._journal, self._scale = limits, journal, scale
        self._interval = interval
        self._state = State.at_start(time.monotonic(), limits)
        self._troubles: dict[Trouble, str] = {}  # that last

    def look(self) -> None:
        """Observe, judge former decisions, decide, carry it out, and tell the router."""
        if self._succeeds(self._look, "waiting"):
            self._succeeds(self._report, "unreported")

    def _succeeds(self, step: Callable[[], None], trouble: Trouble) -> bool:
        try:
            step()
        except KvferryError as error:
            if self._troubles.get(trouble) != str(error):
                self._journal.trouble(trouble, str(error))
            self._troubles[trouble] = str(error)
            return False
        self._troubles.pop(trouble, None)
        return True

    def _look(self) -> None:
        workers = self._ask("/admin/workers")["workers"]
        told = self._ask(f"/admin/workload?seconds={self._limits.window:g}")["rows"]
        rows = [Row(*row) for row in told]
        change = self._ask("/admin/pools")["change"]
        disaggregation, queue = self._ask("/admin/disaggregation"), self._ask("/admin/queue")
        seen = observe(workers, rows, change, disaggregation, queue, self._limits.window)
        now = time.monotonic()
        self._state, judged = judge(seen, self._state, now, self._limits)
        for one in judged:
            self._journal.judged(one)

        def predict(requests: Sequence[Request], pools: Pools) -> float:
            placement = placement_of(workers, mean(request.prompt_tokens for request in requests))
            profile = observed_profile(workers, rows)
            return predictor(profile, placement, self._limits.slo)(requests, pools)

        self._state, decision = decide(seen, self._state, now, self._limits, predict)
        if decision is not None:
            self._decided(decision)

    def _report(self) -> None:
        """For the router's console."""
        report = {
            "mode": self._mode,
            "slo": asdict(self._limits.slo),
            "interval": self._interval,
            "decisions": self._journal.decisions(),
        }
        self._ask("/admin/autopilot", "PUT", report)

    def _ask(self, path: str, method: str = "GET", body: object = None) -> Any:
        return fetch(self._url, path, self._api_key, method=method, body=body)

    def _decided(self, decision: Decision) -> None:
        done, trouble = self._mode == "on", None
        if done:
            try:
                self._change(decision)
            except KvferryError as error:
                done, trouble = False, str(error)
        self._journal.decided(decision, done, trouble)

    def _change(self, decision: Decision) -> None:
        """Prompts and roles by the router, numbers by whatever the operator chose."""
        present, wanted = decision.present, decision.wanted
        if wanted.local_prefill_tokens != present.local_prefill_tokens:
            body = {"mode": "auto", "local_prefill_tokens": wanted.local_prefill_tokens}
            self._ask("/admin/disaggregation", "POST", body)
        if wanted.num_workers != present.num_workers:
            assert self._scale is not None, "without it numbers have no bounds"
            self._scale(present, wanted)
        elif wanted.prefill != present.prefill:
            body = {"prefill": wanted.prefill, "decode": wanted.decode}
            self._ask("/admin/pools", "POST", body)


def observe(
    workers: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    change: dict[str, Any] | None,
    disaggregation: dict[str, Any],
    queue: dict[str, Any],
    window: float,
) -> Observation:
    """What the router's answers say, for a decision that looks back for ``window`` seconds."""
    serving = [worker for worker in workers if worker["state"] == "serving"]
    prefill = [worker for worker in serving if worker["role"] == "prefill"]
    if disaggregation["mode"] == "never":
        prefill = []  # they idle: one pool does all
    queued = [
        Row(window - age, num_tokens, 0, 0, None, None) for age, num_tokens in queue["requests"]
    ]
    adjustable = disaggregation["mode"] == "auto"
    local = disaggregation["longest_local_prompt"] if adjustable else None
    return Observation(
        Pools(len(prefill), len(serving) - len(prefill), local),
        rows,
        [row for row in queued if row.arrival >= 0],
        queue["wait"],
        num_open=len(queued) + sum(worker["requests"] for worker in workers),
        changing=change is not None and change["state"] == "running",
    )
