"""A deployment that is asked for more than it can do: nothing hangs, nothing leaks, 429 in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.stack import Stack

BLOCK, BLOCKS = 16, 64
MAX_LEN = BLOCK * BLOCKS
SEQUENCES = 6
NEW = 192  # tokens of output: four such sequences fill the pool, SEQUENCES are 1.5 times as many


@pytest.fixture(scope="module")
def tight() -> Iterator[Stack]:
    """A decode pool that a few sequences fill."""
    sizes = ["--block-size", str(BLOCK), "--max-model-len", str(MAX_LEN)]
    limits = ["--num-kv-blocks", str(BLOCKS), "--max-num-seqs", str(SEQUENCES)]
    with Stack("demo", worker=sizes, decode=[limits]) as stack:
        yield stack


def ask(stack: Stack, number: int, max_tokens: int = NEW, **more: Any) -> httpx.Response:
    body = {"model": "test", "prompt": [300 + number] * 64, "max_tokens": max_tokens}
    body |= {"temperature": 0, "ignore_eos": True, **more}
    return stack.client.post("/v1/completions", json=body)


def test_a_decode_pool_at_one_and_a_half_times_its_capacity_serves_everything(tight: Stack) -> None:
    with ThreadPoolExecutor(3 * SEQUENCES) as threads:
        answers = list(threads.map(lambda number: ask(tight, number), range(3 * SEQUENCES)))
    assert [a.status_code for a in answers] == [200] * len(answers)
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [NEW] * len(answers)
    tight.assert_idle()
    decode = tight.metrics("decode")
    assert decode["kvferry_num_preemptions_total"] > 0  # it was more than the pool holds
    assert decode["kvferry_kv_grants_expired_total"] == 0


def test_a_flood_is_turned_away_and_service_goes_on() -> None:
    slots = [["--max-num-seqs", "2"]]
    router = ["--max-queue-time", "1", "--max-num-requests", "64"]
    with Stack("demo", decode=slots, router=router) as stack:
        with ThreadPoolExecutor(64) as threads:
            for _ in range(4):
                ask(stack, 0)  # so that the router knows how long a request takes
            flood = [threads.submit(ask, stack, n, 4 * NEW) for n in range(60)]
            assert stack.client.get("/ready").status_code == 200
            answers = [asked.result() for asked in flood]
        shed = [a for a in answers if a.status_code == 429]
        assert shed
        assert {a.status_code for a in answers} == {200, 429}
        for answer in shed:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        began = time.monotonic()
        assert ask(stack, 0).status_code == 200
        assert time.monotonic() - began < 10.0
        page = stack.client.get("/metrics").text
        assert 'kvferry_requests_shed_total{reason="forecast"}' in page
        assert "kvferry_num_requests_waiting 0.0" in page
        stack.assert_idle()
