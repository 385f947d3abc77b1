"""*What if* and *Apply* in headless Chromium, over a router and three workers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium, expect, needs_chromium, page_of
from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack

pytestmark = [needs_chromium, pytest.mark.slow]
PATIENCE = 60.0  # seconds
NUM_REQUESTS = 40  # to predict from


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path / "llama")
    with Stack(model, prefill=[(), ()], decode=[()]) as running:
        yield running


@pytest.fixture
def page() -> Iterator[Any]:
    with chromium() as browser, page_of(browser, PATIENCE) as page:
        yield page


def completion(tokens: int) -> dict[str, Any]:
    return {"model": "test", "prompt": [7] * 40, "max_tokens": tokens, "ignore_eos": True}


def test_pools_are_tried_then_changed_under_an_open_stream(page: Any, stack: Stack) -> None:
    for _ in range(NUM_REQUESTS):
        stack.client.post("/v1/completions", json=completion(8)).raise_for_status()
    page.goto(stack.url + "/console")
    expect(page.locator(".pool.prefill tbody tr")).to_have_count(2)
    page.locator("#what-if summary").press("Enter")
    verdict = page.locator("#what-if-verdict")
    expect(verdict).to_contain_text("2 prefill + 1 decode would keep")
    expect(page.locator("#what-if-figures tbody td").first).to_have_text(re.compile(r"\d m?s"))

    page.get_by_role("slider", name="Pools").press("ArrowLeft")
    expect(verdict).to_contain_text("1 prefill + 2 decode would keep")
    expect(page.locator("#what-if-curve polyline")).to_have_count(2)

    with ThreadPoolExecutor(1) as threads:
        streamed = threads.submit(stream, stack, 400)
        page.locator("#apply").press("Enter")
        page.locator("#apply-yes").press("Enter")
        expect(page.locator("#change-title")).to_have_text("Changed to 1 prefill + 2 decode")
        assert streamed.result(PATIENCE) == 400
    expect(page.locator("#change-flips li")).to_have_text(
        [re.compile(r"prefill-\d → decode: done")]
    )
    expect(page.locator(".pool.prefill tbody tr")).to_have_count(1)
    expect(page.locator(".pool.decode tbody tr")).to_have_count(2)
    expect(page.locator("#apply")).to_be_disabled()
    assert sorted(row["role"] for row in stack.workers()) == ["decode", "decode", "prefill"]
    stack.client.post("/v1/completions", json=completion(8)).raise_for_status()


def stream(stack: Stack, tokens: int) -> int:
    """How many tokens a stream brought."""
    body = {**completion(tokens), "stream": True, "stream_options": {"include_usage": True}}
    with stack.client.stream("POST", "/v1/completions", json=body) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    count: int = json.loads(events[-1])["usage"]["completion_tokens"]
    return count
