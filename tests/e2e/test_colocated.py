"""Decode workers that compute prompts themselves: without a prefill pool, and when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.e2e.streams import Streams
from tests.stack import Stack, scrape

LONG = {"prompt": [i % 250 for i in range(700)], "max_tokens": 40}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": [5, 6, 7], "temperature": 0},
    {"prompt": [9] * 33, "temperature": 1.1, "seed": 5, "presence_penalty": 0.4},
    {**LONG, "temperature": 0},
]
WORKER = ["--dtype", "float32", "--max-num-batched-tokens", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[list[list[int]]]:
    """What prefill and decode give together, undisturbed."""
    with Stack(model, worker=WORKER) as stack:
        yield Streams(stack, REQUESTS).join()


def kill(stack: Stack, name: str) -> None:
    victim = stack.processes.pop(name)
    victim.kill()
    victim.wait()


def paths(stack: Stack) -> dict[str, float]:
    samples = scrape(f"{stack.url}/metrics", stack.client)
    name = "kvferry_requests_path_total{path="
    return {key.removeprefix(name)[:-1]: n for key, n in samples.items() if key.startswith(name)}


def test_streams_survive_a_killed_decode_worker(model: Path, expected: list[list[int]]) -> None:
    with Stack(model, prefill=[], decode=[(), ()], worker=WORKER) as stack:
        streams = Streams(stack, REQUESTS[:2])
        streams.wait_for(30)
        kill(stack, max(stack.workers(), key=lambda row: row["requests"])["id"])
        assert streams.join() == expected[:2]
        assert Streams(stack, [REQUESTS[2]]).join() == [expected[2]]
        stack.assert_idle()
        assert paths(stack).keys() == {"local"}


def test_decode_goes_on_alone_when_the_prefill_pool_is_killed_and_stops_when_it_is_back(
    model: Path, expected: list[list[int]]
) -> None:
    auto = ["--disaggregation", "auto", "--local-prefill-tokens", "0"]
    with Stack(model, worker=WORKER, router=auto) as stack:
        streams = Streams(stack, REQUESTS[:2])
        streams.wait_for(5)
        kill(stack, "prefill-0")
        assert streams.join() == expected[:2]
        assert Streams(stack, [REQUESTS[2]]).join() == [expected[2]]
        assert paths(stack)["local"] >= 1
        assert stack.client.get("/ready").json()["colocated"]
        stack.start_worker("prefill", "prefill-0")
        stack.wait_for_workers(2)
        before = paths(stack)
        assert Streams(stack, [REQUESTS[0]]).join() == expected[:1]
        assert paths(stack) == {**before, "remote": before["remote"] + 1}
        stack.assert_idle()
