"""The console in headless Chromium, over a router whose workers are scripted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from protocol.errors import WorkerLostError
from router.api_keys import ApiKeys
from router.generation import GenerationRequest, QueueState, TokenChunk
from tests.browser import expect, needs_chromium
from tests.router.conftest import LOAD, Router

pytestmark = needs_chromium


@pytest.fixture
def drained(router: Router, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gives the router two workers, prefill-0 and decode-0. What is drained."""
    drained: list[str] = []

    def rows() -> list[dict[str, Any]]:
        return [
            {
                "id": f"{role}-0",
                "role": role,
                "state": "leaving" if f"{role}-0" in drained else "serving",
                "transport": "UCX 1 (somewhere): tcp/lo",
                "load": LOAD,
            }
            for role in ("prefill", "decode")
        ]

    def drain(worker_id: str) -> dict[str, Any]:
        drained.append(worker_id)
        return {"id": worker_id}

    monkeypatch.setattr(router.generator, "workers", rows)
    monkeypatch.setattr(router.generator, "drain", drain)
    return drained


def test_both_pools_are_shown_and_a_worker_drains(
    page: Any, router: Router, drained: list[str]
) -> None:
    page.goto(router.url + "/console")
    expect(page.locator("#status")).to_have_text("Serving")
    row = page.locator(".pool.decode tbody tr")
    expect(row).to_contain_text("decode-0")
    expect(row).to_contain_text("2 / 8")
    expect(row).to_contain_text("75 %")
    expect(row).to_contain_text("tcp/lo")
    expect(page.locator(".pool.prefill tbody tr")).to_contain_text("1 (300 tok)")
    button = page.get_by_role("button", name="Drain decode-0")
    button.press("Enter")
    expect(page.locator("#drain")).to_contain_text("Drain decode-0?")
    expect(page.locator("#drain-last")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#drain")).to_be_hidden()
    assert drained == []
    button.press("Enter")
    page.locator("#drain-yes").press("Enter")
    expect(button).to_be_disabled()
    assert drained == ["decode-0"]


def test_a_request_appears_and_its_waterfall_opens_by_keyboard(page: Any, router: Router) -> None:
    page.goto(router.url + "/console")
    expect(page.locator("#no-requests")).to_have_text("No request has ended yet.")
    for text in ("Hello there", "Good-bye"):
        router.say(text, "length")
        router.post("/v1/completions", model="test", prompt="Say hello")
    rows = page.locator("#requests tbody tr")
    expect(rows).to_have_count(2)
    rows.nth(0).locator("button").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.locator("dialog#request")
    expect(dialog).to_contain_text("To the first token")
    expect(dialog.locator(".waterfall").first).to_contain_text("tokenise")
    expect(dialog.locator(".verdict").first).to_contain_text("of it was")
    expect(dialog.locator(".ticks")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(rows.nth(1).locator("button")).to_be_focused()


def test_a_transfer_that_took_no_time_comes_after_the_first_token(
    page: Any, router: Router
) -> None:
    def with_transfer(route: Any) -> None:
        answer = route.fetch()
        content = answer.json()
        [sequence] = content["sequences"]
        [delivered] = [n for n, s in enumerate(sequence["stages"]) if s["name"] == "deliver"][:1]
        first = sequence["time_to_first_token"]
        transfer = {**sequence["stages"][delivered], "name": "transfer", "start": first}
        sequence["stages"].insert(delivered + 1, {**transfer, "seconds": 0.0})
        route.fulfill(response=answer, json=content)

    router.say("Hello there", "length")
    router.post("/v1/completions", model="test", prompt="Say hello")
    page.route("**/admin/requests/cmpl-*", with_transfer)
    page.goto(router.url + "/console")
    page.locator("#requests tbody tr button").press("Enter")
    to_first_token, then = page.locator(".waterfall").nth(0), page.locator(".waterfall").nth(1)
    expect(then).to_contain_text("transfer")
    expect(to_first_token).to_contain_text("deliver")
    expect(to_first_token).not_to_contain_text("transfer")


def test_for_want_of_which_pool_requests_wait_and_waited(page: Any, router: Router) -> None:
    def late(request: GenerationRequest) -> list[TokenChunk]:
        time.sleep(0.3)
        request.timeline.waited_for.update({"prefill": 0.1, "decode": 0.2})
        request.timeline.enter("prefill", time.monotonic())
        return [TokenChunk([5], "length")]

    router.generator.scripts = late
    router.post("/v1/completions", model="test", prompt="Say hello")
    router.generator.waiting = QueueState([(1.0, 5)], ["decode"], 2.5)
    page.goto(router.url + "/console")
    expect(page.locator("#short")).to_contain_text("waits for room in decode; a new request")
    router.generator.waiting = QueueState([], [], 0.0)
    expect(page.locator("#short")).to_be_hidden()
    page.locator("#requests tbody tr button").press("Enter")
    verdict = page.locator("#request-body .verdict").first
    expect(verdict).to_contain_text("of it was router queue.")
    expect(verdict).to_contain_text(
        "No decode worker had any for 200 ms. No prefill worker had any for 100 ms."
    )


@pytest.mark.parametrize("script", [[TokenChunk([5], "length")], [WorkerLostError("gone")]])
def test_a_request_of_one_token_or_none_is_shown_without_gaps(
    page: Any, router: Router, script: list[TokenChunk | Exception]
) -> None:
    router.generator.script = script
    router.post("/v1/completions", model="test", prompt="Say hello")
    page.goto(router.url + "/console")
    page.locator("#requests tbody tr button").press("Enter")
    body = page.locator("#request-body")
    expect(body.locator(".verdict").first).to_contain_text("of it was")
    expect(body).not_to_contain_text("null")
    expect(body).not_to_contain_text("undefined")


def test_the_objective_is_kept(page: Any, router: Router) -> None:
    page.goto(router.url + "/console")
    expect(page.locator("input[name=tpot]")).to_have_value("100")
    page.locator("input[name=tpot]").fill("40")
    with page.expect_request(lambda asked: "tpot=0.04&" in asked.url):
        page.keyboard.press("Enter")
    page.reload()
    expect(page.locator("input[name=tpot]")).to_have_value("40")
    page.locator("input[name=tpot]").fill("-1")
    with page.expect_request(lambda asked: "overview" in asked.url) as asked:
        page.keyboard.press("Tab")
    assert "tpot=0.04&" in asked.value.url


def test_the_key_is_asked_for_once(page: Any, start: Callable[..., Router]) -> None:
    router = start(api_keys=ApiKeys(["secret"]))
    page.goto(router.url + "/console")
    expect(page.locator("#key")).to_be_visible()
    page.locator("#key-input").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_contain_text("does not accept this key")
    page.locator("#key-input").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Serving")
    page.reload()
    expect(page.locator("#status")).to_have_text("Serving")
    expect(page.locator("#key")).to_be_hidden()


def test_an_api_key_is_not_enough_where_there_is_an_admin_key(
    page: Any, start: Callable[..., Router]
) -> None:
    router = start(api_keys=ApiKeys(["client"]), admin_keys=ApiKeys(["operator"]))
    page.goto(router.url + "/console")
    for key, says in (("client", "the key given is an API key"), ("nobody", "missing or wrong")):
        page.locator("#key-input").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_contain_text(says)
    page.locator("#key-input").fill("operator")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Serving")


def test_why_an_api_key_changes_nothing_is_said(
    page: Any, start: Callable[..., Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = start(api_keys=ApiKeys(["client"]))
    rows = [{"id": "decode-0", "role": "decode", "state": "serving", "load": LOAD}]
    monkeypatch.setattr(router.generator, "workers", lambda: rows)
    page.goto(router.url + "/console")
    page.locator("#key-input").fill("client")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Drain decode-0").press("Enter")
    page.locator("#drain-yes").press("Enter")
    expect(page.locator("#drain-error")).to_contain_text("--admin-api-key")
    expect(page.locator("#key")).to_be_hidden()


def test_a_router_that_is_gone_is_said_to_be_and_comes_back(page: Any, router: Router) -> None:
    router.generator.script = [TokenChunk([5], "length")]
    page.goto(router.url + "/console")
    expect(page.locator("#status")).to_have_text("Serving")
    page.route("**/admin/**", lambda route: route.abort())
    expect(page.locator("#problem")).to_contain_text("No answer from the router.")
    expect(page.locator("#status")).to_have_text("Connection lost")
    page.unroute("**/admin/**")
    expect(page.locator("#status")).to_have_text("Serving")
    expect(page.locator("#problem")).to_be_hidden()


def test_why_nothing_is_served_is_shown(page: Any, router: Router) -> None:
    router.generator.reason = "no decode worker is registered"
    page.goto(router.url + "/console")
    expect(page.locator("#status")).to_have_text("no decode worker is registered")
    expect(page.locator(".pool.decode .empty")).to_be_visible()
