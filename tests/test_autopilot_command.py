"""``kvferry autopilot`` against a scripted router."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import autopilot
from cli.autopilot import Mode
from cli.autopilot_journal import REMEMBERED, Journal
from cli.main import app
from cli.scaling import Scale, by_command
from planner.autopilot_terms import Decision, Limits, Pools
from planner.latency import LinearLatency
from planner.outcome import Slo
from protocol.errors import KvferryError
from protocol.messages import WorkerLoad
from router.autopilot_routes import AutopilotReport
from tests.planner.profiles import profile, timed

LIMITS = Limits(Slo(ttft=1.0, tpot=0.1), cool_down=1e-6, forecast_every=1e-6)


class Router:
    """The administration of one prefill and three decode workers, and what was posted to it."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.disaggregation = {"mode": "always", "longest_local_prompt": 0}
        self.reachable = True
        self.report: dict[str, Any] = {}
        self.refusal: str | None = None  # of reports
        self.queue: dict[str, Any] = {"requests": [], "wait": 0.0}
        self.rows = [[i * 0.5, 1000, 10, 0, 0.5, 0.01] for i in range(200)]

    def fetch(
        self, _: str, path: str, __: str | None, *, method: str = "GET", body: object = None
    ) -> Any:
        if not self.reachable:
            raise KvferryError("connection refused")
        if method == "PUT":
            assert path == "/admin/autopilot"
            if self.refusal:
                raise KvferryError(self.refusal)
            # As it arrives, and as the router reads it.
            self.report = AutopilotReport.model_validate_json(json.dumps(body)).model_dump()
            return {}
        if method == "POST":
            self.posted.append((path, body))
            return {}
        if path == "/admin/workers":
            return {"workers": [worker("prefill"), *(worker("decode") for _ in range(3))]}
        if path == "/admin/pools":
            return {"prefill": 1, "decode": 3, "change": None}
        if path == "/admin/disaggregation":
            return self.disaggregation
        if path == "/admin/queue":
            return self.queue
        return {"rows": self.rows}


def worker(role: str) -> dict[str, Any]:
    """A prompt token takes 1 ms, a decode step 10 ms."""
    latency = profile().latency
    assert isinstance(latency, LinearLatency)
    load = WorkerLoad(
        total_blocks=10_000,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        prefill_steps=timed("prefill", latency, 30).prefill,
        decode_steps=timed("decode", latency, 60).decode,
    ).model_dump()
    return {
        "role": role,
        "state": "serving",
        "requests": 1,
        "block_size": 16,
        "block_wire_bytes": 1024,
        "load": load,
    }


def pilot(mode: Mode, limits: Limits = LIMITS, scale: Scale | None = None) -> autopilot.Autopilot:
    return autopilot.Autopilot("http://router", None, mode, limits, Journal(), scale, 5.0)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    router = Router()
    monkeypatch.setattr(autopilot, "fetch", router.fetch)
    return router


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_changes_the_pools_and_says_why(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    pilot("on").look()
    (told,) = lines(capsys)
    wanted = told["wanted"]
    assert router.posted == [
        ("/admin/pools", {"prefill": wanted["prefill"], "decode": wanted["decode"]})
    ]
    assert wanted["prefill"] > 1
    assert wanted["local_prefill_tokens"] is None, "the operator wants all prompts on prefill"
    assert (told["event"], told["done"], told["error"]) == ("decision", True, None)
    assert "within the SLO" in told["reason"]


def test_a_dry_run_only_tells_and_is_judged_all_the_same(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    looking = pilot("dry-run")
    looking.look()
    assert router.report["decisions"][-1]["judged"] is None
    looking.look()
    assert router.posted == []
    events = [line["event"] for line in lines(capsys)]
    assert events[:2] == ["decision", "outcome"]
    first = router.report["decisions"][-1]
    assert not first["done"]
    assert first["judged"] >= first["time"]
    assert 0 <= first["predicted"] <= 1
    assert (router.report["mode"], router.report["slo"]["ttft"]) == ("dry-run", 1.0)


def test_where_no_ratio_does_decode_is_given_prompts_of_its_own(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefill lacks half a worker: 3.5 s of prompts a second for four workers."""
    router.rows = [[i * 0.4, 1400, 2, 0, 9.0, 0.01] for i in range(300)]
    router.disaggregation = {"mode": "auto", "longest_local_prompt": 20}
    limits = replace(LIMITS, slo=Slo(ttft=3.0, tpot=10.0))
    pilot("on", limits).look()
    [told] = lines(capsys)
    assert told["present"]["local_prefill_tokens"] == 20
    assert told["wanted"]["local_prefill_tokens"] == 1400
    told = dict(router.posted)
    body = {"mode": "auto", "local_prefill_tokens": 1400}
    assert told["/admin/disaggregation"] == body


def test_prefill_workers_that_idle_by_the_operators_will_are_left_alone(router: Router) -> None:
    router.disaggregation = {"mode": "never", "longest_local_prompt": 0}
    pilot("on").look()
    assert router.posted == []


def test_a_router_that_is_away_is_waited_for_and_told_once(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    looking = pilot("on")
    router.reachable = False
    looking.look()
    looking.look()
    router.reachable = True
    looking.look()
    events = [line["event"] for line in lines(capsys)]
    assert events == ["waiting", "decision"]


def test_what_the_router_holds_back_is_seen(router: Router) -> None:
    workers = router.fetch("", "/admin/workers", None)["workers"]
    router.queue = {"requests": [(700.0, 9), (12.5, 1000), (0.5, 20)], "wait": 30.0}
    seen = autopilot.observe(workers, [], None, router.disaggregation, router.queue, window=600.0)
    assert [(row.arrival, row.prompt_tokens) for row in seen.queued] == [(587.5, 1000), (599.5, 20)]
    assert (seen.wait, seen.num_open) == (30.0, 3 + len(workers))


def test_workers_go_by_the_operators_command(router: Router, tmp_path: Path) -> None:
    router.rows = [[i * 0.5, 10, 10, 0, 0.5, 0.01] for i in range(200)]
    wanted = tmp_path / "{prefill}-{decode}"
    pilot("on", replace(LIMITS, workers=(2, 4)), by_command(f"touch {wanted}")).look()
    assert (tmp_path / "1-2").exists()
    assert router.posted == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["--scale-command", "scale {worker}"],
        ["--scale-command", "x", "--min-workers", "9"],
        ["--kubernetes-prefill", "deployments/prefill"],
        ["--kubernetes-prefill", "deployments/p", "--kubernetes-decode", "deployments/d"],
        ["--scale-command", "x", "--kubernetes-decode", "deployments/d"],
    ],
)
def test_a_wrong_option_is_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["autopilot", "--slo-ttft", "1", "--slo-tpot", "1", *wrong])
    assert result.exit_code == 1
    assert "error: " in result.output


def test_that_the_router_takes_no_report_is_told_once_and_stops_nothing(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    router.refusal = "changing the pools needs an admin key"
    looking = pilot("dry-run")
    looking.look()
    looking.look()
    told = lines(capsys)
    assert sum(line["event"] == "decision" for line in told) >= 1
    [unreported] = [line for line in told if line["event"] == "unreported"]
    assert unreported["reason"].endswith("admin key")
    assert not any(line["event"] == "waiting" for line in told)


def test_the_last_decisions_are_remembered_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = Journal()
    for number in range(REMEMBERED + 5):
        decision = Decision(float(number), "misses", Pools(1, 3), Pools(2, 2), "late", 0.9)
        journal.decided(decision, done=True, error=None)
    journal.judged(replace(decision, outcome=0.8))
    told = journal.decisions()
    assert len(told) == REMEMBERED
    newest = told[0]
    assert (newest["predicted"], newest["outcome"], newest["reason"]) == (0.9, 0.8, "late")
    assert newest["judged"] >= newest["time"]
    assert told[1]["outcome"] is None
    url = f"http://127.0.0.1:{journal.serve(0)}"
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        page = answer.read()
    assert b'kvferry_autopilot_attainment{is="measured"} 0.8' in page
    assert len(lines(capsys)) == REMEMBERED + 6
