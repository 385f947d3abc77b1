"""Workers change their role under open streams: none breaks, tokens stay exact, nothing leaks.

``KVFERRY_FLIPS``, an even number, and ``KVFERRY_STREAMS`` make the loop longer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import httpx
import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.e2e.streams import SOON, Streams
from tests.stack import Stack, eventually, scrape

pytestmark = pytest.mark.slow

NUM_FLIPS = int(os.environ.get("KVFERRY_FLIPS", "4"))
NUM_STREAMS = int(os.environ.get("KVFERRY_STREAMS", "8"))
FLIPPED = 2.0  # seconds from the end of a drain until the new role serves
SHORT = {"model": "test", "prompt": [1, 2], "max_tokens": 3, "ignore_eos": True}
SEEDED = {"temperature": 1.1, "seed": 5, "frequency_penalty": 0.05}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": [5, 6, 7], "temperature": 0},
    {"prompt": [9] * 33, "temperature": 0},
    {"prompt": [5, 6, 7], **SEEDED},
    {"prompt": list(range(64)), **SEEDED},
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker that drains takes its streams along only for a moment; the rest move."""
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    options = ["--dtype", "float32", "--drain-timeout", "0.3"]
    with Stack(model, prefill=[(), ()], decode=[(), ()], worker=options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[list[int]]:
    """What undisturbed requests give."""
    return Streams(stack, REQUESTS).join()


@pytest.fixture(autouse=True)
def _nothing_is_left(stack: Stack) -> Iterator[None]:
    yield
    stack.wait_for_workers(4)
    stack.assert_idle()


def post(stack: Stack, path: str, body: dict[str, Any]) -> httpx.Response:
    return stack.client.post(path, json=body)


def rows(stack: Stack) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in stack.workers()}


def flip(stack: Stack, worker: str, role: str) -> None:
    """Ask for it, and wait for its end."""
    answer = post(stack, f"/admin/workers/{worker}/role", {"role": role})
    assert answer.status_code == 200, answer.text
    assert ended(stack) == ("done", None)
    assert rows(stack)[worker]["role"] == role


def ended(stack: Stack) -> tuple[str, str | None]:
    """The end of the change under way: its state and the reason."""

    def change() -> dict[str, Any]:
        found: dict[str, Any] = stack.client.get("/admin/pools").json()["change"]
        return found

    assert eventually(lambda: change()["state"] != "running", SOON)
    return change()["state"], change()["reason"]


def other(role: str) -> str:
    return "decode" if role == "prefill" else "prefill"


def pools(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "pools", *arguments, "--url", stack.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON)


def in_role(stack: Stack, role: str) -> list[str]:
    return sorted(name for name, row in rows(stack).items() if row["role"] == role)


def first_of(stack: Stack, role: str) -> str:
    return in_role(stack, role)[0]


def kill(stack: Stack, name: str) -> None:
    process = stack.processes.pop(name)
    process.kill()
    process.wait()


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    return str(answer.json()["error"]["message"])


def test_streams_survive_flip_after_flip(stack: Stack, expected: list[list[int]]) -> None:
    length = 300  # tokens
    asked = [{**ask, "max_tokens": length} for ask in islice(cycle(REQUESTS), NUM_STREAMS)]
    tokens = [whole[:length] for whole in islice(cycle(expected), NUM_STREAMS)]
    for role in islice(cycle(["prefill", "decode"]), NUM_FLIPS):
        streams = Streams(stack, asked)
        streams.wait_for(1)
        flip(stack, first_of(stack, role), other(role))
        assert streams.join() == tokens
        stack.assert_idle()


def test_a_change_shows_and_is_quick(stack: Stack) -> None:
    worker = first_of(stack, "decode")
    url = rows(stack)[worker]["metrics"]
    before = scrape(url, stack.client)
    shown = pools(stack, "flip", worker, "prefill")
    assert shown.returncode == 0, shown.stderr
    assert f"{worker} is prefill" in shown.stdout
    after = scrape(url, stack.client)
    changes = "kvferry_role_changes_total{role=prefill}"
    assert after[changes] == before.get(changes, 0) + 1
    seconds = "kvferry_role_change_seconds_sum"
    assert after[seconds] - before[seconds] < FLIPPED
    flip(stack, worker, "decode")  # back at once
    assert post(stack, "/v1/completions", SHORT).status_code == 200


def test_the_prefix_cache_is_kept(stack: Stack) -> None:
    ask = {**SHORT, "prompt": list(range(100, 180)), "max_tokens": 1}
    aside, keeper = in_role(stack, "prefill")
    flip(stack, aside, "decode")
    assert post(stack, "/v1/completions", ask).status_code == 200
    flip(stack, aside, "prefill")
    flip(stack, keeper, "decode")
    flip(stack, keeper, "prefill")
    flip(stack, aside, "decode")
    url = rows(stack)[keeper]["metrics"]
    hits = scrape(url, stack.client)["kvferry_prefix_cache_hits_total"]
    assert post(stack, "/v1/completions", ask).status_code == 200
    assert scrape(url, stack.client)["kvferry_prefix_cache_hits_total"] > hits
    flip(stack, aside, "prefill")


def test_pools_are_resized_one_worker_after_the_other(
    stack: Stack, expected: list[list[int]]
) -> None:
    streams = Streams(stack, REQUESTS)
    streams.wait_for(1)
    shown = pools(stack, "set", "--prefill", "1", "--decode", "3")
    assert shown.returncode == 0, shown.stderr
    assert stack.client.get("/admin/pools").json()["prefill"] == 1
    shown = pools(stack, "set", "--prefill", "3", "--decode", "1")
    assert shown.returncode == 0, shown.stderr
    found = stack.client.get("/admin/pools").json()
    assert (found["prefill"], found["decode"]) == (3, 1)
    assert [flip["state"] for flip in found["change"]["flips"]] == ["done", "done"]
    assert streams.join() == expected
    nothing = pools(stack, "set", "--prefill", "3", "--decode", "1")
    assert nothing.returncode == 0, nothing.stderr
    assert pools(stack, "set", "--prefill", "2", "--decode", "2").returncode == 0


def test_what_cannot_be_done_is_refused_with_its_reason(stack: Stack) -> None:
    keeper, other_one = in_role(stack, "prefill")
    path = f"/admin/workers/{keeper}/role"
    assert "already" in refusal(post(stack, path, {"role": "prefill"}), 409)
    assert "nobody" in refusal(post(stack, "/admin/workers/nobody/role", {"role": "decode"}), 404)
    assert "role" in refusal(post(stack, path, {"role": "router"}), 400)
    assert "but 4 serve" in refusal(post(stack, "/admin/pools", {"prefill": 3, "decode": 5}), 400)
    assert "empty" in refusal(post(stack, "/admin/pools", {"prefill": 0, "decode": 4}), 400)
    assert "decode" in refusal(post(stack, "/admin/pools", {"prefill": 2}), 400)
    assert post(stack, f"/admin/workers/{other_one}/role", {"role": "decode"}).status_code == 200
    assert "under way" in refusal(post(stack, path, {"role": "decode"}), 409)
    assert ended(stack) == ("done", None)
    assert "empty" in refusal(post(stack, path, {"role": "decode"}), 409)
    shown = pools(stack, "flip", keeper, "decode")
    assert shown.returncode == 1
    assert "the last that serves prefill" in shown.stderr
    flip(stack, other_one, "prefill")


def test_a_worker_killed_meanwhile_takes_no_stream_along(
    stack: Stack, expected: list[list[int]]
) -> None:
    streams = Streams(stack, REQUESTS)
    streams.wait_for(30)
    victim = first_of(stack, "decode")
    post(stack, f"/admin/workers/{victim}/role", {"role": "prefill"})
    kill(stack, victim)
    assert ended(stack) == ("failed", f"worker {victim} was lost")
    assert streams.join() == expected
    stack.start_worker("decode", victim)


def test_a_worker_told_to_end_meanwhile_ends(stack: Stack, expected: list[list[int]]) -> None:
    streams = Streams(stack, REQUESTS)
    streams.wait_for(30)
    leaving = first_of(stack, "decode")
    post(stack, f"/admin/workers/{leaving}/role", {"role": "prefill"})
    process = stack.processes.pop(leaving)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 0
    assert ended(stack)[0] == "failed"
    assert streams.join() == expected
    stack.start_worker("decode", leaving)


def test_a_change_outlives_its_router(stack: Stack) -> None:
    Streams(stack, REQUESTS).wait_for(1)  # they end with the router
    worker = first_of(stack, "decode")
    post(stack, f"/admin/workers/{worker}/role", {"role": "prefill"})
    assert eventually(lambda: rows(stack)[worker]["next_role"] == "prefill", SOON)
    kill(stack, "router")
    stack.start_router()
    stack.wait_for_workers(4)
    assert rows(stack)[worker]["role"] == "prefill"
    assert stack.client.get("/admin/pools").json() == {"prefill": 3, "decode": 1, "change": None}
    flip(stack, worker, "decode")
    assert post(stack, "/v1/completions", SHORT).status_code == 200


def test_memory_made_for_one_role_serves_the_other(stack: Stack, expected: list[list[int]]) -> None:
    """On one host only prefill's KV lies in mapped memory: what has none sends over UCX."""
    options = ["--dtype", "float32"]
    pools = {"prefill": [()], "decode": [(), ()]}
    with Stack(stack.model, **pools, worker=options, transport="auto") as swapped:
        flip(swapped, "decode-0", "prefill")
        flip(swapped, "prefill-0", "decode")
        flip(swapped, "decode-1", "prefill")
        assert in_role(swapped, "decode") == ["prefill-0"]
        assert Streams(swapped, REQUESTS).join() == expected
        swapped.assert_idle()
