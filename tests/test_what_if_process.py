"""The process that predicts for the router's console, and ``kvferry advise``."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cli import what_if
from cli.main import app
from cli.what_if import Simulation
from planner.latency import LinearLatency
from planner.observed import Row
from planner.profile import WorkerProfile
from protocol.errors import DeadlineError, InvalidRequestError, KvferryError, OverloadedError
from router.what_if_routes import Question, WhatIfBody
from router.workload_log import Observed
from tests.planner.observations import rows, workers
from tests.planner.profiles import profile

FAST = profile(fixed=2e-3, per_token=1e-4, decode=(5e-3, 1e-7, 1e-5))
PATIENCE = 60.0  # seconds


def question(num: int = 100) -> Question:
    asked = WhatIfBody(prefill=2, decode=1, ttft=0.2, tpot=0.02)
    return Question(asked, [Observed(*row) for row in rows(num)], workers(FAST, 1, 2))


@pytest.fixture
async def simulation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(what_if, "DEADLINE", PATIENCE)
    simulation = Simulation()
    yield simulation
    await simulation.close()
    assert children() == []


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [child for child in found if "cli.what_if_process" in child.cmdline()]


async def test_one_process_answers_question_after_question(simulation: Simulation) -> None:
    assert children() == []
    answers = await asyncio.gather(*(simulation.predict(question()) for _ in range(2)))
    [process] = children()
    assert answers[0]["present_pools"] == [1, 2]
    assert answers[0]["asked"] == answers[1]["asked"]
    assert 0 < answers[0]["asked"]["attainment"] <= 1
    with pytest.raises(InvalidRequestError, match="only 3 requests were served"):
        await simulation.predict(question(3))
    await simulation.predict(question())
    assert children() == [process]


async def test_the_latency_model_alone(simulation: Simulation) -> None:
    told = await simulation.predict(Question(None, [], workers(FAST, 1, 2)))
    fitted = WorkerProfile.model_validate(told)
    assert isinstance(fitted.latency, LinearLatency)
    assert isinstance(FAST.latency, LinearLatency)
    assert fitted.latency.decode.fixed == pytest.approx(FAST.latency.decode.fixed, rel=1e-3)
    with pytest.raises(InvalidRequestError, match="no worker to learn"):
        await simulation.predict(Question(None, [], []))


async def test_a_process_that_dies_is_replaced(simulation: Simulation) -> None:
    await simulation.predict(question())
    [process] = children()
    process.suspend()
    asked = asyncio.create_task(simulation.predict(question()))
    await asyncio.sleep(0.1)
    process.kill()
    with pytest.raises(KvferryError, match="the simulating process ended"):
        await asked
    assert (await simulation.predict(question()))["num_observed"] == 100


async def test_a_process_that_hangs_is_ended_in_time(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    await simulation.predict(question())
    children()[0].suspend()
    monkeypatch.setattr(what_if, "DEADLINE", 0.2)
    with pytest.raises(DeadlineError, match=r"took longer than 0\.2 s"):
        await simulation.predict(question())
    assert children() == []


async def test_questions_do_not_pile_up(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(what_if, "MAX_WAITING", 1)
    first = asyncio.create_task(simulation.predict(question()))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await simulation.predict(question())
    await first


class Admin(BaseHTTPRequestHandler):
    """A router's ``/admin``."""

    workers: list[dict[str, Any]]
    rows: list[Row]
    longest_local_prompt = 0

    def do_GET(self) -> None:
        told: dict[str, Any] = {"rows": self.rows}
        if "workers" in self.path:
            told = {"workers": self.workers}
        elif "disaggregation" in self.path:
            told = {"longest_local_prompt": self.longest_local_prompt}
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def admin() -> Iterator[tuple[str, type[Admin]]]:
    kind = type("Fresh", (Admin,), {"workers": workers(FAST, 1, 2), "rows": rows(60)})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", kind
        server.shutdown()
        thread.join()


def advise(url: str, *options: str) -> str:
    deadlines = ["--slo-ttft", "200", "--slo-tpot", "30", "--requests", "60"]
    found = CliRunner().invoke(app, ["advise", "--router", url, *deadlines, *options])
    assert found.exit_code == 0, found.output
    return found.stdout


def as_observed(worker: WorkerProfile) -> list[Row]:
    """Requests that took as long as an idle worker takes."""
    seconds = worker.latency.step_seconds
    return [
        row._replace(ttft=seconds(row.prompt_tokens, row.prompt_tokens**2, 0, 0), tpot=0.006)
        for row in rows(60)
    ]


def test_advice_for_a_running_router(admin: tuple[str, type[Admin]]) -> None:
    url, kind = admin
    kind.rows = as_observed(FAST)
    told = json.loads(advise(url, "--json"))
    assert told["now"]["option"]["placement"]["prefill"] == 1
    assert told["now"]["measured"] == told["now"]["predicted"] == 1.0
    assert told["now"]["rate"] == pytest.approx(5, rel=0.3)
    assert told["now"]["option"]["placement"]["local_prefill_tokens"] == 0
    better = told["best"]["goodput"] > 1.05 * told["now"]["option"]["goodput"]
    assert told["advice"].startswith("To change: " if better else "Leave it as it is")
    words = advise(url)
    assert told["answer"][:20] in words
    assert told["advice"] in words.replace("\n", " ")


def test_a_model_that_does_not_fit_changes_nothing(admin: tuple[str, type[Admin]]) -> None:
    url, kind = admin
    kind.rows = [row._replace(ttft=5.0) for row in kind.rows]
    assert "Measured and predicted differ" in advise(url)


def test_too_little_to_advise_on(admin: tuple[str, type[Admin]]) -> None:
    url, kind = admin
    kind.rows = kind.rows[:5]
    found = CliRunner().invoke(
        app, ["advise", "--router", url, "--slo-ttft", "200", "--slo-tpot", "30"]
    )
    assert found.exit_code == 1
    assert "only 5 requests were served" in found.stderr
    found = CliRunner().invoke(
        app, ["advise", "--router", "http://127.0.0.1:9", "--slo-ttft", "1", "--slo-tpot", "1"]
    )
    assert found.exit_code == 1
    assert "Connection refused" in found.stderr
