"""*What if* and *Apply* in headless Chromium, over a router whose workers are scripted."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import InvalidRequestError, RoleChangeRefusedError
from tests.browser import expect, needs_chromium
from tests.router.conftest import LOAD, Router, eventually

pytestmark = needs_chromium

VIEW = {
    "ttft": {"p50": 0.1, "p90": 0.2, "p99": 0.3}, "tpot": {"p50": 0.01, "p90": 0.02, "p99": 0.03},
    "beyond_capacity": False, "attainment": 0.95, "goodput": 3.8,
}  # fmt: skip
PREDICTION = {
    "rate": 4.0, "measured_rate": 4.0, "num_observed": 120, "num_simulated": 500, "margin": 0.02,
    "present_pools": [2, 2], "capacity": 9.0, "fits": True,
    "measured": VIEW, "present": VIEW,
    "asked": {**VIEW, "ttft": {"p50": 1.1, "p90": 1.2, "p99": None}, "attainment": 0.4},
    "curve": [{"rate": rate, "present": rate, "asked": rate / 2} for rate in (2.0, 4.0, 8.0)],
}  # fmt: skip


@pytest.fixture
def four_workers(router: Router, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows of two prefill and two decode workers."""
    rows = [
        {"id": f"{role}-{i}", "role": role, "state": "serving", "next_role": None, "load": LOAD}
        for role in ("prefill", "decode")
        for i in range(2)
    ]
    monkeypatch.setattr(router.generator, "workers", lambda: rows)
    router.generator.prediction = PREDICTION
    return rows


def open_what_if(page: Any, router: Router) -> None:
    """By keyboard, once the page has come to rest."""
    page.goto(router.url + "/console")
    expect(page.locator("#status")).to_have_text("Serving")
    page.locator("#what-if summary").press("Enter")


def ask_what_if(page: Any, router: Router) -> Any:
    """The slider of the pools, beside a first answer."""
    open_what_if(page, router)
    expect(page.locator("#what-if-answer")).to_be_visible()
    return page.get_by_role("slider", name="Pools")


@pytest.mark.usefixtures("four_workers")
def test_what_other_pools_would_give_is_predicted(page: Any, router: Router) -> None:
    slider = ask_what_if(page, router)
    expect(page.locator("#apply")).to_be_disabled()
    slider.press("ArrowRight")
    expect(page.locator("#what-if-verdict")).to_have_text(
        "At 4 requests/s, 3 prefill + 1 decode would keep 40.0 % within the objective."
    )
    first = page.locator("#what-if-figures tbody tr").first
    expect(first.locator("td")).to_have_text(["100 ms", "100 ms", "1.10 s"])
    expect(first.locator("td").last).to_have_class("late")
    expect(page.locator("#what-if-curve polyline")).to_have_count(2)
    expect(page.locator("#what-if-unfit")).to_be_hidden()
    page.get_by_role("slider", name="Rate").press("End")
    expect(page.locator("#what-if-rate")).to_have_text("64 /s 16 × measured")
    page.get_by_role("slider", name="TTFT within").press("Home")
    page.get_by_label("Workload of").select_option("3600")
    assert eventually(lambda: router.generator.questions[-1].asked.seconds == 3600)
    asked = router.generator.questions[-1].asked
    assert (asked.prefill, asked.decode, asked.rate_factor, asked.seconds) == (3, 1, 16, 3600)
    assert asked.ttft == 0.001
    page.locator("#what-if-reset").press("Enter")
    expect(page.locator("#what-if-prefill")).to_have_text("2 prefill + 2 decode")
    expect(page.locator("#apply")).to_be_disabled()


@pytest.mark.usefixtures("four_workers")
def test_why_nothing_is_predicted_is_shown(page: Any, router: Router) -> None:
    router.generator.prediction = InvalidRequestError("only 3 requests were served")
    open_what_if(page, router)
    expect(page.locator("#what-if-problem")).to_have_text("only 3 requests were served")
    expect(page.locator("#what-if-answer")).to_be_hidden()


def test_pools_are_changed_and_the_change_is_seen(
    page: Any, router: Router, four_workers: list[dict[str, Any]]
) -> None:
    ask_what_if(page, router).press("ArrowRight")
    pools = router.generator.pools
    pools.refusal = RoleChangeRefusedError("another change is under way")
    page.locator("#apply").press("Enter")
    expect(page.locator("#apply-title")).to_have_text("Change the pools to 3 prefill + 1 decode?")
    page.locator("#apply-yes").press("Enter")
    expect(page.locator("#apply-error")).to_have_text("another change is under way")
    assert pools.change is None
    pools.refusal = None
    page.locator("#apply-yes").press("Enter")
    expect(page.locator("#apply-dialog")).to_be_hidden()
    expect(page.locator("#change-title")).to_have_text("Changing to 3 prefill + 1 decode")
    expect(page.locator("#change-flips")).to_contain_text("decode-0 → prefill: draining")
    expect(page.locator("#apply")).to_be_disabled()
    assert pools.change is not None
    flips = [{**pools.change["flips"][0], "state": "done", "seconds": 1.5}]
    pools.change = {**pools.change, "state": "done", "flips": flips}
    four_workers[2]["role"] = "prefill"
    expect(page.locator("#change-title")).to_have_text("Changed to 3 prefill + 1 decode")
    expect(page.locator("#change-flips")).to_contain_text("decode-0 → prefill: done 1.50 s")
    expect(page.locator(".pool.prefill tbody tr")).to_have_count(3)
    expect(page.locator("#what-if-prefill")).to_have_text("3 prefill + 1 decode")


@pytest.mark.usefixtures("four_workers")
def test_more_than_the_pools_can_compute_is_said_to_be_so(page: Any, router: Router) -> None:
    full = {**VIEW, "beyond_capacity": True, "attainment": 0.0, "goodput": 0.0}
    none = dict.fromkeys(("p50", "p90", "p99"))
    asked = {"asked": {**full, "ttft": none}, "rate": 12.0}
    router.generator.prediction = {**PREDICTION, **asked}
    ask_what_if(page, router)
    expect(page.locator("#what-if-verdict")).to_have_text(
        "At 12 requests/s the queue of 2 prefill + 2 decode would grow without end: "
        "they compute 9 at most."
    )
    first = page.locator("#what-if-figures tbody tr").first.locator("td").last
    expect(first).to_have_text("∞")
    expect(first).to_have_class("late")


def test_without_workers_there_is_nothing_to_predict(
    page: Any, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.generator, "workers", list)
    open_what_if(page, router)
    expect(page.locator("#what-if-prefill")).to_have_text("no workers")
    expect(page.locator("#what-if-problem")).to_contain_text("No decode worker is registered")
    expect(page.locator(".pool.decode table")).to_be_hidden()
    assert router.generator.questions == []
