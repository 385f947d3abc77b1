"""The same prompt many times at once: it is computed once and its KV moves once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack

BLOCK, BLOCKS = 8, 60  # tokens; of the prompts
COUNT = 8  # prompts at once
OWN = 3  # tokens of each prompt that no other has


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    worker = ["--dtype", "float32", "--block-size", str(BLOCK), "--max-num-batched-tokens", "64"]
    with Stack(model, prefill=[(), ()], decode=[()], worker=worker) as running:
        yield running


def ask(stack: Stack, prompt: list[int]) -> list[int]:
    body = {"model": "test", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = stack.client.post("/v1/completions", json=body).raise_for_status().json()
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def totals(stack: Stack) -> tuple[float, float]:
    """Prompt tokens computed and blocks moved so far."""
    decode = stack.metrics("decode")
    moved = decode["kvferry_kv_transfer_bytes_total{direction=received}"]
    computed = stack.metrics("prefill")["kvferry_prompt_tokens_computed_total"]
    return computed, moved / decode["kvferry_kv_block_bytes"]


def test_a_burst_is_computed_once_and_moves_once(stack: Stack) -> None:
    prompts = [[10] * (BLOCKS * BLOCK) + [20 + number] * OWN for number in range(COUNT)]
    before = totals(stack)
    with ThreadPoolExecutor(COUNT) as threads:
        together = list(threads.map(lambda prompt: ask(stack, prompt), prompts))
    stack.assert_idle()
    computed, moved = (now - was for now, was in zip(totals(stack), before, strict=True))
    assert computed <= BLOCKS * BLOCK + COUNT * OWN
    assert moved <= BLOCKS + COUNT
    assert together == [ask(stack, prompt) for prompt in prompts]
