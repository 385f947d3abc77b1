"""The autopilot's decisions in the console, in headless Chromium."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.browser import expect, needs_chromium
from tests.router.autopilot_report import DECISION, REPORT, send
from tests.router.conftest import Router

pytestmark = needs_chromium


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def report(router: Router, mode: str, *decisions: dict[str, Any]) -> None:
    send(router, {**REPORT, "mode": mode, "decisions": decisions}).raise_for_status()


def test_a_decision_is_shown_and_later_what_came_of_it(page: Any, router: Router) -> None:
    page.goto(router.url + "/console")
    expect(page.locator("#status")).to_have_text("Serving")
    expect(page.locator("#autopilot")).to_be_hidden()

    report(router, "dry-run")
    expect(page.locator("#autopilot-mode")).to_have_text("Dry run")
    expect(page.locator("#autopilot-aim")).to_contain_text("90 % of requests within TTFT 300 ms")
    expect(page.locator("#no-decisions")).to_be_visible()
    expect(page.locator("#decisions")).to_be_hidden()

    longer = {**DECISION["present"], "local_prefill_tokens": 75}
    trouble = {"done": False, "error": "no answer"}
    failed = {**DECISION, "time": ago(120), "wanted": longer, **trouble}
    change = {**DECISION, "time": ago(30)}
    report(router, "on", change, failed)
    expect(page.locator("#autopilot-mode")).to_have_text("On")
    expect(page.locator("#decisions tbody tr")).to_have_count(2)
    newest, oldest = page.locator("#decisions tbody tr").all()
    expect(newest).to_contain_text("1P2D → 2P1D")
    told = ["", DECISION["reason"], "changed", "99.0 %", "not yet"]
    expect(newest.locator("td")).to_contain_text(told)
    expect(oldest).to_contain_text("prompts on decode up to 0 → 75 tokens")
    expect(oldest.locator("td")).to_contain_text(["", "no answer", "failed", "", ""])
    expect(page.locator("#charts line.change")).to_have_count(4)  # one in each chart

    report(router, "on", {**change, "outcome": 0.5, "judged": ago(0)}, {**failed, "judged": ago(0)})
    expect(newest.locator("td").last).to_have_text("50.0 %")
    expect(newest.locator("td").last).to_have_class("late")
    expect(oldest.locator("td").last).to_have_text("no request")


def test_one_that_reports_no_more_is_said_to_be_silent(page: Any, router: Router) -> None:
    told = {**REPORT, "decisions": [], "age": 100.0}
    page.route("**/admin/autopilot", lambda route: route.fulfill(json={"autopilot": told}))
    page.goto(router.url + "/console")
    expect(page.locator("#autopilot-mode")).to_have_text("Silent")
    expect(page.locator("#autopilot-aim")).to_contain_text("It has not reported since")
