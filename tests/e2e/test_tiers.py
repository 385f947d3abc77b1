"""A prefill worker whose pool is too small for what it is asked, with a disk below it.

Real processes; every answer is held against transformers, and the metrics show that the prefixes
came from the disk: tokens are counted as computed once only.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS, reference_greedy, write_checkpoint
from tests.stack import Stack, eventually

B = 16  # tokens in a block
NEW = 8  # tokens generated
LENGTH = 20 * B + 3
BLOCKS = 48  # of the prefill worker: two of these prompts
NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("tiers") / "llama")


def prompts() -> list[list[int]]:
    rng = random.Random("tiers")
    return [[rng.randrange(250) for _ in range(LENGTH)] for _ in range(NUM_PROMPTS)]


def ask(stack: Stack, prompt: list[int]) -> tuple[list[int], int]:
    """The answer's tokens and how many of the prompt's were cached."""
    body = {
        "model": "test",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = stack.client.post("/v1/completions", json=body).raise_for_status().json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["token_ids"], cached


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_evicted_prefixes_come_back_and_outlive_the_worker(
    checkpoint: Path, tmp_path: Path, role: str
) -> None:
    """In a pool of their own, or beside decode where there is no prefill pool."""

    options = ["--num-kv-blocks", str(BLOCKS), "--kv-disk-dir", str(tmp_path / "kv")]
    options += ["--kv-disk-size", "64MiB"]
    asked = prompts()
    expected = [reference_greedy(checkpoint, prompt, NEW) for prompt in asked]
    full = LENGTH // B  # blocks of a prompt
    with Stack(
        checkpoint,
        worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", str(BLOCKS * B)],
        prefill=[options] if role == "prefill" else [],
        decode=[["--num-kv-blocks", "400"] if role == "prefill" else options],
    ) as stack:

        def saved(blocks: int) -> bool:
            return stack.metrics(role)["kvferry_kv_tier_blocks{tier=disk}"] >= blocks

        for round_ in range(2):
            for number, (prompt, tokens) in enumerate(zip(asked, expected, strict=True)):
                assert ask(stack, prompt) == (tokens, full * B if round_ else 0)
                assert eventually(lambda: saved(full * (number + 1)), 20)  # noqa: B023
        metrics = stack.metrics(role)
        assert metrics["kvferry_kv_tier_restored_total"] >= full * (NUM_PROMPTS - 2)
        computed = metrics["kvferry_prompt_tokens_computed_total"]
        assert computed == NUM_PROMPTS * (LENGTH + LENGTH % B)
        stack.assert_idle()

        worker = stack.processes.pop(f"{role}-0")
        worker.kill()
        worker.wait()
        others = 1 if role == "prefill" else 0
        stack.wait_for_workers(others)
        stack.start_worker(role, f"{role}-0", options)
        stack.wait_for_workers(others + 1)
        assert stack.metrics(role)["kvferry_kv_tier_blocks{tier=disk}"] == full * NUM_PROMPTS
        for prompt, tokens in zip(asked, expected, strict=True):
            assert ask(stack, prompt) == (tokens, full * B)
        metrics = stack.metrics(role)
        assert metrics["kvferry_kv_tier_restored_total"] == full * NUM_PROMPTS
        assert metrics["kvferry_prompt_tokens_computed_total"] == NUM_PROMPTS * (LENGTH % B)
        stack.assert_idle()
