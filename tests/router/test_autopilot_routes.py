"""``/admin/autopilot``: what an autopilot reports, and who may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from router.api_keys import ApiKeys
from router.autopilot_routes import MAX_BODY
from tests.router.autopilot_report import DECISION, REPORT, send
from tests.router.conftest import PATIENCE, Router


def shown(router: Router) -> Any:
    answer = httpx.get(f"{router.url}/admin/autopilot", timeout=PATIENCE)
    return answer.raise_for_status().json()["autopilot"]


def test_the_last_report_is_shown_with_its_age(router: Router) -> None:
    assert shown(router) is None
    send(router, {**REPORT, "mode": "dry-run", "decisions": []}).raise_for_status()
    send(router, {**REPORT, "of a later version": 1}).raise_for_status()
    told = shown(router)
    assert 0 <= told.pop("age") < PATIENCE
    [decision] = told["decisions"]
    assert told == {**REPORT, "decisions": [decision]}
    assert decision["wanted"] == {"prefill": 2, "decode": 1, "local_prefill_tokens": None}
    assert decision["time"] == "2026-03-01T12:00:00.250000Z"
    assert (decision["predicted"], decision["outcome"], decision["judged"]) == (0.99, None, None)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"mode": "off"}, "mode"),
        ({"interval": 0}, "interval"),
        ({"slo": {"ttft": 1, "tpot": 1, "attainment": 2}}, "slo.attainment"),
        ({"decisions": [{**DECISION, "time": "12:00"}]}, "decisions.0.time"),
        ({"decisions": [{**DECISION, "predicted": "all"}]}, "decisions.0.predicted"),
    ],
)
def test_what_is_no_report_is_refused_by_name(
    router: Router, wrong: dict[str, Any], param: str
) -> None:
    answer = send(router, {**REPORT, **wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert shown(router) is None


def test_a_report_without_end_is_refused(router: Router) -> None:
    many = [DECISION] * (MAX_BODY // len(DECISION["reason"]))
    assert send(router, {**REPORT, "decisions": many}).status_code == 413


def test_only_an_admin_key_may_report(start: Callable[..., Router]) -> None:
    clients = ApiKeys(["client"])
    assert send(start(api_keys=clients), REPORT, "client").status_code == 403
    both = start(api_keys=clients, admin_keys=ApiKeys(["operator"]))
    assert send(both, REPORT).status_code == 401
    assert send(both, REPORT, "client").status_code == 403
    assert send(both, REPORT, "operator").status_code == 200
