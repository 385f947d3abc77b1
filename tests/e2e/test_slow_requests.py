"""Which stage made a request slow: each cause is provoked, and found with the console alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from protocol.link import write_cluster_key
from tests.browser import chromium, expect, needs_chromium, page_of
from tests.chaos.line import Condition
from tests.chaos.network import Network, NetworkStack
from tests.chaos.scene import CannotPlayError
from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack

pytestmark = [needs_chromium, pytest.mark.slow]
PATIENCE = 60.0  # seconds
FAR = Condition(delay=0.25)  # from prefill to decode: several round trips are a second
HOSTS = ["router", "prefill-0", "decode-0"]
FEW_TOKENS_A_STEP = ("--max-num-batched-tokens", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with chromium() as browser, page_of(browser, PATIENCE) as page:
        yield page


def ask(stack: Stack, count: int, prompt: int, output: int) -> None:
    """So many requests at once."""

    def one(number: int) -> None:
        body = {"model": "test", "prompt": [10 + number] * prompt, "max_tokens": output}
        stack.client.post("/v1/completions", json={**body, "ignore_eos": True}).raise_for_status()

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(one, range(count)))


def longest_stages(page: Any, url: str) -> list[str]:
    """What an operator does: opens the slowest request, and reads the bold stage of each part."""
    page.goto(url + "/console")
    page.get_by_role("button", name="Slow").press("Enter")
    page.locator("#requests tbody tr button").first.press("Enter")
    dialog = page.locator("dialog#request")
    expect(dialog).to_contain_text("From the first token to the end")
    stages: list[str] = dialog.locator("tr.longest th").all_text_contents()
    for verdict, stage in zip(dialog.locator(".verdict").all_text_contents(), stages, strict=True):
        assert f"of it was {stage}." in verdict
    return stages


@pytest.mark.parametrize(
    ("prefill", "decode", "load", "stage"),
    [
        ((), ("--max-num-seqs", "1"), (12, 20, 100), "router queue"),
        (FEW_TOKENS_A_STEP, (), (12, 400, 4), "prefill queue"),
        (FEW_TOKENS_A_STEP, (), (1, 450, 4), "prefill"),
    ],
)
def test_the_cause_of_a_late_first_token_is_found(
    page: Any,
    model: Path,
    prefill: Sequence[str],
    decode: Sequence[str],
    load: tuple[int, int, int],
    stage: str,
) -> None:
    with Stack(model, prefill=[prefill], decode=[decode]) as stack:
        ask(stack, *load)
        assert longest_stages(page, stack.url)[0] == stage


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as opened:
        try:
            yield opened.enter_context(Network(HOSTS))
        except CannotPlayError as reason:
            pytest.skip(str(reason))


def test_a_slow_line_between_the_pools_is_found(
    page: Any, model: Path, network: Network, tmp_path: Path
) -> None:
    key = tmp_path / "cluster.key"
    write_cluster_key(key)
    with_key = ("--cluster-key-file", str(key))
    stack = NetworkStack(
        network, model, prefill=[()], decode=[()], router=("--insecure", *with_key), worker=with_key
    )
    with stack, network.spoilt(network.among(HOSTS[1:]), FAR):
        ask(stack, 1, prompt=400, output=20)
        assert longest_stages(page, stack.url)[1] == "transfer"
