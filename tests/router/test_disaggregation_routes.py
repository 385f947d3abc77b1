"""``/admin/disaggregation``: who computes prompts, told and changed."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.router.conftest import PATIENCE, Router


def present(router: Router) -> Any:
    return httpx.get(router.url + "/admin/disaggregation", timeout=PATIENCE).json()


def test_it_is_changed_and_told(router: Router) -> None:
    assert present(router)["mode"] == "always"
    answer = router.post("/admin/disaggregation", mode="auto", local_prefill_tokens=256)
    assert answer.status_code == 200
    assert answer.json()["local_prefill_tokens"] == 256
    assert present(router) == answer.json()
    router.post("/admin/disaggregation", mode="auto")
    assert present(router)["local_prefill_tokens"] is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({}, "mode"),
        ({"mode": "sometimes"}, "mode"),
        ({"mode": "auto", "local_prefill_tokens": -1}, "local_prefill_tokens"),
        ({"mode": "auto", "local_prefill_tokens": 1.5}, "local_prefill_tokens"),
        ({"mode": "always", "local_prefill_tokens": 9}, "local_prefill_tokens"),
    ],
)
def test_what_makes_no_sense_is_named(router: Router, wrong: dict[str, Any], param: str) -> None:
    answer = router.post("/admin/disaggregation", **wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert present(router)["mode"] == "always"
