"""``kvferry autopilot`` against a scripted router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import autopilot
from cli.main import app
from planner.autopilot_terms import Limits
from planner.latency import LinearLatency
from planner.outcome import Slo
from protocol.errors import KvferryError
from protocol.messages import WorkerLoad
from tests.planner.profiles import profile, timed

LIMITS = Limits(Slo(ttft=1.0, tpot=0.1), cool_down=1e-6, forecast_every=1e-6)


class Router:
    """The administration of one prefill and three decode workers, and what was posted to it."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.reachable = True
        self.rows = [[i * 0.5, 1000, 10, 0, 0.5, 0.01] for i in range(200)]

    def fetch(
        self, _: str, path: str, __: str | None, *, method: str = "GET", body: object = None
    ) -> Any:
        if not self.reachable:
            raise KvferryError("connection refused")
        if method == "POST":
            self.posted.append((path, body))
            return {}
        if path == "/admin/workers":
            return {"workers": [worker("prefill"), *(worker("decode") for _ in range(3))]}
        if path == "/admin/pools":
            return {"prefill": 1, "decode": 3, "change": None}
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
        decode_steps=timed("decode", latency, 30).decode,
    ).model_dump()
    return {
        "role": role,
        "state": "serving",
        "requests": 1,
        "block_size": 16,
        "block_bytes": 1024,
        "load": load,
    }


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
    autopilot.Autopilot("http://router", None, "on", LIMITS, []).look()
    (told,) = lines(capsys)
    assert router.posted == [("/admin/pools", told["wanted"])]
    assert told["wanted"]["prefill"] > 1
    assert (told["event"], told["done"], told["error"]) == ("decision", True, None)
    assert "within the SLO" in told["reason"]


def test_a_dry_run_only_tells_and_is_judged_all_the_same(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    pilot = autopilot.Autopilot("http://router", None, "dry-run", LIMITS, [])
    pilot.look()
    pilot.look()
    assert router.posted == []
    events = [line["event"] for line in lines(capsys)]
    assert events[:2] == ["decision", "outcome"]


def test_a_router_that_is_away_is_waited_for_and_told_once(
    router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    pilot = autopilot.Autopilot("http://router", None, "on", LIMITS, [])
    router.reachable = False
    pilot.look()
    pilot.look()
    router.reachable = True
    pilot.look()
    events = [line["event"] for line in lines(capsys)]
    assert events == ["waiting", "decision"]


def test_workers_go_by_the_operators_command(router: Router, tmp_path: Path) -> None:
    router.rows = [[i * 0.5, 10, 10, 0, 0.5, 0.01] for i in range(200)]
    limits = Limits(LIMITS.slo, cool_down=1e-6, forecast_every=1e-6, workers=(2, 4))
    wanted = tmp_path / "{prefill}-{decode}"
    autopilot.Autopilot("http://router", None, "on", limits, ["touch", str(wanted)]).look()
    assert (tmp_path / "1-2").exists()
    assert router.posted == []


@pytest.mark.parametrize(
    "wrong",
    [["--scale-command", "scale {worker}"], ["--scale-command", "x", "--min-workers", "9"]],
)
def test_a_wrong_option_is_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["autopilot", "--slo-ttft", "1", "--slo-tpot", "1", *wrong])
    assert result.exit_code == 1
    assert "error: " in result.output
