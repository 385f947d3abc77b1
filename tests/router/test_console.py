"""The console's files and the administration's figures, over real sockets."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import httpx
import pytest

from protocol.errors import WorkerLostError
from router.api_keys import ApiKeys
from router.generation import QueueState, TokenChunk
from tests.router.conftest import HANG, PATIENCE, Router, eventually

FILES = [file.name for file in files("router").joinpath("console").iterdir()]


def get(router: Router, path: str) -> Any:
    answer = httpx.get(router.url + path, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_is_open_and_loads_nothing_from_elsewhere(start: Callable[..., Router]) -> None:
    router = start(api_keys=ApiKeys(["secret"]))
    page = httpx.get(router.url + "/console", follow_redirects=True)
    assert page.status_code == 200
    assert page.url.path == "/console/"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"app.js", "console.css", "icon.svg"} == set(wanted)
    assert not re.search(r"<style|style=|<script(?![^>]*src=)", page.text)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_under_the_policy(router: Router, name: str) -> None:
    answer = httpx.get(f"{router.url}/console/{name if name != 'index.html' else ''}")
    assert answer.status_code == 200
    assert "content-security-policy" in answer.headers
    assert answer.content == files("router").joinpath("console", name).read_bytes()
    if name.endswith(".js"):
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        imports = set(re.findall(r'from "\./([^"]+)"', answer.text))
        assert imports <= set(FILES)


@pytest.mark.parametrize("path", ["overview", "queue", "requests", "requests/cmpl-1"])
def test_the_figures_need_a_key(start: Callable[..., Router], path: str) -> None:
    router = start(api_keys=ApiKeys(["secret"]))
    assert httpx.get(f"{router.url}/admin/{path}").status_code == 401
    right = httpx.get(f"{router.url}/admin/{path}", headers={"Authorization": "Bearer secret"})
    assert right.status_code == (404 if "cmpl" in path else 200)


def test_what_waits_in_the_router(router: Router) -> None:
    router.generator.waiting = QueueState([(1.5, 7), (0.5, 3)], ["decode"], 2.5)
    told = {"waiting": 2, "short_of": ["decode"], "wait": 2.5}
    assert get(router, "/admin/overview")["queue"] == told
    assert get(router, "/admin/queue") == {**told, "requests": [[1.5, 7], [0.5, 3]]}


def test_where_a_requests_time_went(router: Router) -> None:
    router.say("Hello", "length")
    asked = time.monotonic()
    answer = router.post("/v1/completions", model="test", prompt="Say hello").json()
    took = time.monotonic() - asked
    found = get(router, f"/admin/requests/{answer['id']}")
    assert found["id"] == answer["id"]
    [sequence] = found["sequences"]
    assert sequence["outcome"] == "length"
    assert sequence["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert sequence["output_tokens"] == answer["usage"]["completion_tokens"]
    first, total = sequence["time_to_first_token"], sequence["seconds"]
    assert 0 < first <= total <= took
    stages = sequence["stages"]
    assert sum(stage["seconds"] for stage in stages) == pytest.approx(total, abs=1e-5)
    before = [s["seconds"] for s in stages if s["start"] + s["seconds"] <= first + 2e-6]
    assert sum(before) == pytest.approx(first, abs=1e-5)
    assert sequence["token_times"]["stride"] == 1
    assert len(sequence["token_times"]["seconds"]) == sequence["output_tokens"]
    assert sequence["token_times"]["seconds"][0] == pytest.approx(first, abs=1e-5)


def test_every_sequence_of_a_request_is_told(router: Router) -> None:
    router.say("Hello", "length")
    answer = router.post("/v1/completions", model="test", prompt=["a", "b"]).json()
    sequences = get(router, f"/admin/requests/{answer['id']}")["sequences"]
    assert [s["sequence"] for s in sequences] == [f"{answer['id']}-0", f"{answer['id']}-1"]


def test_the_lists_of_requests(router: Router) -> None:
    router.generator.script = [TokenChunk([1]), WorkerLostError("gone")]
    router.post("/v1/completions", model="test", prompt="a")
    router.say("Hello", "length")
    answer = router.post("/v1/completions", model="test", prompt="b").json()
    lists = get(router, "/admin/requests")
    assert [row["outcome"] for row in lists["recent"]] == ["length", "worker_lost"]
    assert lists["recent"][0]["id"] == answer["id"]
    assert len(lists["slow"]) == 2
    assert lists["running"] == []
    assert len(get(router, "/admin/requests?limit=1")["recent"]) == 1


def test_a_request_under_way(router: Router) -> None:
    router.say("Hello", "length")
    router.generator.script = [TokenChunk(router.generator.script[0].token_ids), HANG]
    body = {"model": "test", "prompt": "a", "stream": True}
    with httpx.stream("POST", router.url + "/v1/completions", json=body, timeout=PATIENCE) as said:
        lines = said.iter_lines()
        assert next(lines)
        [row] = get(router, "/admin/requests")["running"]
        assert (row["outcome"], row["output_tokens"]) == (None, 1)
        assert sum(get(router, "/admin/overview")["stages"].values()) == 1
    assert eventually(lambda: not get(router, "/admin/requests")["running"])
    assert get(router, "/admin/requests")["recent"][0]["outcome"] == "cancelled"


def test_the_overview(router: Router) -> None:
    router.say("Hello there, you", "length")
    router.post("/v1/completions", model="test", prompt="a")
    overview = get(router, "/admin/overview?ttft=100&tpot=100")
    assert overview["workers"] == get(router, "/admin/workers")["workers"]
    assert (overview["model"], overview["not_ready_reason"]) == ("test", None)
    window = overview["window"]
    assert window["rates"]["requests"] > 0
    assert window["goodput"]["attainment"] == 1.0
    for name in ("time_to_first_token", "time_per_output_token", "inter_token_latency"):
        assert 0 < window[name]["p50"] <= window[name]["p90"] <= window[name]["p99"]
    strict = get(router, "/admin/overview?ttft=0.000001")["window"]["goodput"]
    assert strict["attainment"] == 0.0


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("overview?ttft=0", "ttft"),
        ("overview?tpot=fast", "tpot"),
        ("overview?tpot=inf", "tpot"),
        ("overview?after=-1", "after"),
        ("requests?limit=0", "limit"),
        ("requests?limit=nan", "limit"),
    ],
)
def test_bad_queries_are_named(router: Router, query: str, param: str) -> None:
    answer = httpx.get(f"{router.url}/admin/{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_unknown_request_is_said_to_be_so(router: Router) -> None:
    answer = httpx.get(router.url + "/admin/requests/cmpl-none")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"
