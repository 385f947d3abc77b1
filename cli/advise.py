"""``kvferry advise``: ``kvferry plan`` for a running router, from what it observed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console

from cli.admin_client import ask
from cli.options import Attainment, OperatorKey, RouterUrl, SloTpot, SloTtft
from cli.plan import record, show
from planner.fit import observed_profile
from planner.observed import Row, outcome_of, placement_of, repeated, requests_of
from planner.outcome import Slo
from planner.placement import Placement
from planner.plan import MARGIN, Plan, Planner
from planner.search import Option
from planner.simulator import simulate
from planner.what_if import fits
from planner.workload import at_rate, rate_of
from protocol.errors import ConfigError


def advise(
    slo_ttft: SloTtft,
    slo_tpot: SloTpot,
    router: RouterUrl = "http://127.0.0.1:8000",
    api_key: OperatorKey = None,
    attainment: Attainment = 0.9,
    minutes: Annotated[float, typer.Option(help="How far to look back.", min=1, max=60)] = 60,
    requests: Annotated[
        int, typer.Option(help="Requests to simulate: the last ones.", min=20)
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
) -> None:
    """Say what a running router's workers should be, from its last hour."""
    slo = Slo(slo_ttft / 1e3, slo_tpot / 1e3, attainment)
    key = api_key[0] if api_key else None
    workers = ask(router, "/admin/workers", key)["workers"]
    disaggregation = ask(router, "/admin/disaggregation", key)
    told = ask(router, f"/admin/workload?seconds={minutes * 60:g}", key)["rows"]
    rows = [Row(*row) for row in told[-requests:]]
    try:
        came = requests_of(rows)
        profile = observed_profile(workers, rows)
        usual = mean(request.prompt_tokens for request in came)
        present = placement_of(workers, usual, disaggregation["longest_local_prompt"])
        workload = repeated(came, requests)
        planner = Planner(workload, profile, present.num_workers, present)
        with Console(stderr=True).status(f"simulating {requests} requests at many rates"):
            plan = planner.plan(slo, with_map=False)
            option = planner.option(present, slo)
            predicted = simulate(at_rate(workload, rate_of(came)), present, profile)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    measured = outcome_of(rows)
    now = Now(
        option,
        rate_of(came),
        measured.attainment(slo),
        predicted.attainment(slo),
        fits(measured, predicted),
    )
    advice = _advice(plan, now)
    if as_json:
        sys.stdout.write(json.dumps({"advice": advice, "now": asdict(now), **record(plan)}) + "\n")
        return
    show(plan)
    sys.stdout.write(
        f"\nNow {present} carry {option.goodput:.2f} requests/s; {now.rate:.2f} came, of which "
        f"{now.measured:.1%} kept both deadlines (predicted: {now.predicted:.1%}).\n{advice}\n"
    )


@dataclass(frozen=True, slots=True)
class Now:
    """The present placement's own goodput, and the rate that came (requests a second).

    ``measured`` and ``predicted`` are the shares of what came that kept both deadlines.
    """

    option: Option
    rate: float
    measured: float
    predicted: float
    fits: bool  # measured and predicted latencies agree


def _advice(plan: Plan, now: Now) -> str:
    """What to do, in one sentence."""
    if not plan.best.goodput:
        return "No roles and no token budget help: relax the SLO or take faster workers."
    if not now.fits:
        return (
            "Measured and predicted differ: something that the model leaves out costs time (the "
            "console's slow requests tell what). Change nothing for this prediction."
        )
    if plan.best.goodput <= MARGIN * now.option.goodput:
        return "Leave it as it is: nothing else carries 5 % more."
    return f"To change: {'; then '.join(_steps(plan.best.placement, now.option.placement))}."


def _steps(best: Placement, present: Placement) -> list[str]:
    steps = []
    if best.colocated and not present.colocated:
        steps.append(f"run {best.colocated} decode workers and no prefill workers")
    elif best.prefill != present.prefill:
        steps.append(f"kvferry pools set --prefill {best.prefill} --decode {best.decode}")
    if best.max_num_batched_tokens != present.max_num_batched_tokens:
        steps.append(
            f"start the workers with --max-num-batched-tokens {best.max_num_batched_tokens}"
        )
    if best.local_prefill_tokens != present.local_prefill_tokens:
        steps.append(
            "start the router with --disaggregation auto "
            f"--local-prefill-tokens {best.local_prefill_tokens}"
        )
    return steps
