"""Streams survive their workers: whatever dies, freezes or leaves, clients get the same tokens.

Every stream is compared with what the same request gave undisturbed, and afterwards every block
is free again. In float32, so that recomputed KV leads to the same tokens.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.e2e.streams import SOON, Streams
from tests.stack import IDLE, START, Stack, eventually, scrape

GREEDY = {"temperature": 0}
SEEDED = {
    "temperature": 1.1,
    "top_p": 0.95,
    "seed": 5,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.05,
    "repetition_penalty": 1.05,
}
SHORT = {"model": "test", "prompt": [1, 2], "max_tokens": 3, "ignore_eos": True}
ARGUMENTS = {
    "prefill-0": ("--max-num-batched-tokens", "16"),
    "prefill-1": ("--max-num-batched-tokens", "16"),
    "decode-0": ("--drain-timeout", "0.1"),
    "decode-1": (),
}
LONG = {"prompt": [i % 250 for i in range(1800)], "max_tokens": 40}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": [5, 6, 7], **GREEDY},
    {"prompt": [9] * 33, **GREEDY},
    {"prompt": [5, 6, 7], **SEEDED},
    {"prompt": list(range(64)), **SEEDED, "min_tokens": 300, "ignore_eos": False},
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    with Stack(
        model,
        prefill=[ARGUMENTS["prefill-0"], ARGUMENTS["prefill-1"]],
        decode=[ARGUMENTS["decode-0"], ARGUMENTS["decode-1"]],
        worker=["--dtype", "float32"],
    ) as running:
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


def busy(stack: Stack, role: str) -> str:
    """The worker of a role that the router gave the most to."""
    rows = [row for row in stack.workers() if row["role"] == role]
    return str(max(rows, key=lambda row: row["requests"])["id"])


def retries(stack: Stack) -> dict[str, float]:
    """Retries so far by reason."""
    samples = scrape(f"{stack.url}/metrics", stack.client)
    name = "kvferry_request_retries_total{reason="
    return {key.removeprefix(name)[:-1]: n for key, n in samples.items() if key.startswith(name)}


@contextmanager
def retried(stack: Stack, reason: str) -> Iterator[None]:
    """The block makes requests go on elsewhere, for this reason among others."""
    before = retries(stack).get(reason, 0)
    yield
    assert retries(stack).get(reason, 0) > before


def gone(stack: Stack, name: str) -> Callable[[], bool]:
    return lambda: all(row["id"] != name for row in stack.workers())


def restart(stack: Stack, name: str) -> None:
    stack.start_worker(name.rpartition("-")[0], name, ARGUMENTS[name])


def kill(stack: Stack, name: str) -> None:
    victim = stack.processes.pop(name)
    victim.kill()
    victim.wait()


def test_streams_survive_a_killed_decode_worker(stack: Stack, expected: list[list[int]]) -> None:
    with retried(stack, "decode_lost"):
        streams = Streams(stack, REQUESTS)
        streams.wait_for(30)
        victim = busy(stack, "decode")
        kill(stack, victim)
        assert streams.join() == expected
    restart(stack, victim)


def generated(stack: Stack) -> float:
    """Tokens that decode workers have sampled, shown or not."""
    return stack.metrics("decode")["kvferry_generation_tokens_total"]


def letters(stack: Stack) -> dict[str, Any]:
    """A request whose output is held back from its 101st letter on, until it ends there."""
    request = {"prompt": [5, 6, 7], **SEEDED, "guided_regex": "[a-z]{650}", "ignore_eos": False}
    undisturbed = Streams(stack, [request])
    undisturbed.join()
    text = undisturbed.streams[0].text
    assert len(text) == 650
    return {**request, "stop": text[100:600]}


def record(_: Stack) -> dict[str, Any]:
    """A request whose output is held to a JSON schema: two long words and a boolean."""
    word = {"type": "string", "pattern": "^[a-z]{250}$"}
    schema = {
        "type": "object",
        "properties": {"first": word, "second": word, "third": {"type": "boolean"}},
        "required": ["first", "second", "third"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}
    return {"prompt": [8, 9], **SEEDED, "response_format": form, "ignore_eos": False}


@pytest.mark.parametrize("asked", [letters, record])
def test_stop_strings_and_grammars_go_on_where_a_killed_decode_worker_was(
    stack: Stack, asked: Callable[[Stack], dict[str, Any]]
) -> None:
    request = asked(stack)
    undisturbed = Streams(stack, [request])
    undisturbed.join()
    [expected] = undisturbed.streams
    assert expected.finish_reasons == ["stop"]
    before = generated(stack)
    with retried(stack, "decode_lost"):
        disturbed = Streams(stack, [request])
        assert eventually(lambda: generated(stack) - before >= 150, SOON)
        victim = busy(stack, "decode")
        kill(stack, victim)
        [stream] = disturbed.streams
        if asked is letters:
            assert len(stream.text) <= 100
        disturbed.join()
    assert (stream.text, stream.token_ids) == (expected.text, expected.token_ids)
    assert stream.finish_reasons == expected.finish_reasons
    assert stream.usage["completion_tokens"] == expected.usage["completion_tokens"]
    if asked is record:
        assert [*json.loads(stream.text)] == ["first", "second", "third"]
    restart(stack, victim)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_long_prompt_survives_either_worker_killed_meanwhile(stack: Stack, role: str) -> None:
    request = {**LONG, **(SEEDED if role == "prefill" else GREEDY)}
    request["prompt"] = [len(role), *request["prompt"]]  # nothing of it is cached
    urls = {row["id"]: row["metrics"] for row in stack.workers() if row["role"] == "prefill"}

    def computed() -> dict[str, float]:
        return {
            name: scrape(url, stack.client)["kvferry_prompt_tokens_computed_total"]
            for name, url in urls.items()
        }

    before = computed()
    with retried(stack, f"{role}_lost"):
        streams = Streams(stack, [request])
        assert eventually(lambda: computed() != before, SOON)
        victim = busy(stack, role)
        kill(stack, victim)
        assert streams.streams[0].token_ids == [], "too late: the prompt is computed"
        tokens = streams.join()
    assert Streams(stack, [request]).join() == tokens
    restart(stack, victim)


def test_streams_survive_a_frozen_worker_that_comes_back(
    stack: Stack, expected: list[list[int]]
) -> None:
    with retried(stack, "decode_lost"):
        streams = Streams(stack, REQUESTS)
        streams.wait_for(30)
        frozen = busy(stack, "decode")
        stack.processes[frozen].send_signal(signal.SIGSTOP)
        try:
            assert eventually(gone(stack, frozen), SOON)
            tokens = streams.join()
        finally:
            stack.processes[frozen].send_signal(signal.SIGCONT)
        assert tokens == expected


def test_a_worker_that_is_told_to_go_ends_in_time_and_its_streams_go_on(
    stack: Stack, expected: list[list[int]]
) -> None:
    with retried(stack, "worker_left"):
        streams = Streams(stack, REQUESTS)
        streams.wait_for(30)
        process = stack.processes.pop("decode-0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
        assert streams.join() == expected
    restart(stack, "decode-0")


@pytest.mark.parametrize("leaving", ["prefill-0", "decode-1"])
def test_a_drained_worker_ends_what_it_has(
    stack: Stack, leaving: str, expected: list[list[int]]
) -> None:
    before = retries(stack)
    streams = Streams(stack, REQUESTS)
    streams.wait_for(1)
    command = [sys.executable, "-m", "cli.main", "pools", "drain", leaving, "--url", stack.url]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SOON)
    assert f"{leaving} is leaving" in answer.stdout, answer.stderr
    assert stack.processes.pop(leaving).wait(SOON) == 0
    assert streams.join() == expected
    assert retries(stack) == before
    assert eventually(gone(stack, leaving), SOON)
    restart(stack, leaving)


def test_draining_an_unknown_worker_says_so(stack: Stack) -> None:
    answer = stack.client.post("/admin/workers/nobody/drain")
    assert answer.status_code == 404
    assert "nobody" in answer.json()["error"]["message"]


def test_a_request_ends_at_its_own_deadline(stack: Stack) -> None:
    body = {"model": "test", "max_tokens": 1900, "ignore_eos": True, **REQUESTS[0]}
    late = stack.client.post("/v1/completions", json={**body, "timeout": 0.2})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    for wrong in (0, -1, "5"):
        refused = stack.client.post("/v1/completions", json={**body, "timeout": wrong})
        assert refused.status_code == 400


def test_a_second_worker_with_the_same_id_ends_and_the_first_serves_on(stack: Stack) -> None:
    for role in ("prefill", "decode"):
        first = stack.processes[f"{role}-0"]
        stack.start_worker(role, f"{role}-0")
        second = stack.processes[f"{role}-0"]
        stack.processes[f"{role}-0"] = first
        assert second.wait(START) == 1
        assert "another" in stack.log(f"{role}-0")
    answers = [stack.client.post("/v1/completions", json=ask) for ask in [SHORT] * 4]
    assert [answer.status_code for answer in answers] == [200] * 4


def test_workers_free_the_work_of_a_dead_router_and_find_its_successor(stack: Stack) -> None:
    urls = [row["metrics"] for row in stack.workers()]
    streams = Streams(stack, REQUESTS)
    streams.wait_for(5)
    kill(stack, "router")
    with httpx.Client() as client:
        used = [lambda url=url: scrape(url, client)["kvferry_kv_blocks_used"] for url in urls]
        assert any(blocks() for blocks in used)
        assert eventually(lambda: not any(blocks() for blocks in used), 2 * IDLE)
    stack.start_router()
    stack.wait_for_workers(4)
    assert stack.client.post("/v1/completions", json=SHORT).status_code == 200
