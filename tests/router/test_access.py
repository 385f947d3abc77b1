"""Which key opens which routes: the table of ``router/access.py``, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from router.api_keys import ApiKeys
from tests.router.conftest import PATIENCE, Router

USE = [("GET", "/v1/models", None), ("POST", "/tokenize", {"prompt": "a"})]
READ = [
    ("GET", "/admin/overview", None),
    ("GET", "/admin/targets", None),
    ("POST", "/admin/what-if", {"prefill": 2, "decode": 1}),
]
CHANGE = [
    ("POST", "/admin/pools", {"prefill": 1, "decode": 3}),
    ("POST", "/admin/disaggregation", {"mode": "always"}),
    ("POST", "/admin/disaggregation", {"mode": "auto"}),
    ("POST", "/admin/workers/p/drain", None),
    ("POST", "/admin/workers/p/role", {"role": "decode"}),
]
KEYS = {
    "none": {},
    "API": {"api_keys": ApiKeys(["client"])},
    "admin": {"admin_keys": ApiKeys(["operator"])},
    "both": {"api_keys": ApiKeys(["client"]), "admin_keys": ApiKeys(["operator"])},
}


def statuses(router: Router, routes: list[tuple[str, str, Any]], key: str | None) -> set[int]:
    """How each route answers: 200 for whatever the route itself says."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = set()
    for method, path, body in routes:
        answer = httpx.request(
            method, router.url + path, json=body, headers=headers, timeout=PATIENCE
        )
        refused = answer.status_code in (401, 403)
        found.add(answer.status_code if refused else 200)
    return found


@pytest.mark.parametrize(
    ("keys", "key", "use", "read", "change"),
    [
        ("none", None, 200, 200, 200),
        ("none", "anything", 200, 200, 200),
        ("API", None, 401, 401, 401),
        ("API", "client", 200, 200, 403),
        ("admin", None, 200, 401, 401),
        ("admin", "client", 200, 401, 401),
        ("admin", "operator", 200, 200, 200),
        ("both", None, 401, 401, 401),
        ("both", "stranger", 401, 401, 401),
        ("both", "client", 200, 403, 403),
        ("both", "operator", 200, 200, 200),
    ],
)
def test_a_key_opens_what_it_should(
    start: Callable[..., Router], keys: str, key: str | None, use: int, read: int, change: int
) -> None:
    router = start(**KEYS[keys])
    assert statuses(router, USE, key) == {use}
    assert statuses(router, READ, key) == {read}
    assert statuses(router, CHANGE, key) == {change}


def test_who_is_refused_is_told_which_key_it_takes(start: Callable[..., Router]) -> None:
    both, api = start(**KEYS["both"]), start(**KEYS["API"])
    client = {"Authorization": "Bearer client"}
    error = httpx.get(both.url + "/admin/workers", headers=client).json()["error"]
    assert error["code"] == "admin_key_required"
    assert "the key given is an API key" in error["message"]
    error = httpx.post(api.url + "/admin/workers/p/drain", headers=client).json()["error"]
    assert error["code"] == "admin_key_required"
    assert "--admin-api-key" in error["message"]
    stranger = httpx.get(both.url + "/admin/workers")
    assert stranger.headers["www-authenticate"] == "Bearer"
    assert "admin key" in stranger.json()["error"]["message"]
