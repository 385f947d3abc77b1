"""The main test: router → prefill → KV over UCX → decode gives the tokens transformers gives.

Separate processes, real UCX, real HTTP; fp32, greedy, 64 tokens. Each run also shows from the
workers' metrics that KV moved, no more and no less than decode lacked, and that decode computed
no prompt token.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS, reference_greedy, write_checkpoint
from tests.stack import Stack

B = 16  # tokens in a block
NEW = 64  # tokens generated
LENGTHS = (1, B - 1, B, B + 1, 2 * B, 4 * B + 3, 1500)
AT_ONCE = (*LENGTHS, *LENGTHS[:-1], 9 * B, 12 * B + 1, 20 * B)
# Blocks. The longest prompt and its output need 98, so others beside it have to give way.
BIG, SMALL = 2000, 100

# Every family meets every chunk budget and both pools; the first family every combination.
PLANS = [
    (name, budget, blocks)
    for index, name in enumerate(CHECKPOINTS)
    for budget, blocks in (
        [(budget, blocks) for budget in (B, 64, 512) for blocks in (BIG, SMALL)]
        if index == 0
        else [(B, SMALL), (64, BIG), (512, SMALL)]
    )
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("golden")
    golden.cache_clear()


@cache
def golden(name: str, directory: Path) -> tuple[Path, list[list[int]], list[list[int]]]:
    """The checkpoint, the prompts and what transformers generates: first alone, then at once."""
    spec = CHECKPOINTS[name]
    path = directory / name
    if not path.exists():
        write_checkpoint(spec, path)
    rng = random.Random(name)
    prompts = [[rng.randrange(spec.vocab_size) for _ in range(n)] for n in (*LENGTHS, *AT_ONCE)]
    return path, prompts, [reference_greedy(path, prompt, NEW) for prompt in prompts]


def complete(
    stack: Stack, prompt: list[int], started: threading.Event | None = None, **options: object
) -> list[int]:
    """Stream a completion's token ids; ``started`` is set once the first has come."""
    body = {
        "model": "test",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    token_ids: list[int] = []
    with stack.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        events = [line[6:] for line in _noting(answer.iter_lines(), started) if line]
    *chunks, usage = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length", events
    assert usage["usage"]["prompt_tokens"] == len(prompt)
    assert usage["usage"]["completion_tokens"] == NEW
    for chunk in chunks:
        token_ids += chunk["choices"][0]["token_ids"]
    return token_ids


def _noting(lines: Iterator[str], started: threading.Event | None) -> Iterator[str]:
    for line in lines:
        if started is not None:
            started.set()
        yield line


def complete_at_once(stack: Stack, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """All together; the longest is a head ahead, so that it decodes while the others arrive."""
    started = threading.Event()
    longest = max(prompts, key=len)

    def one(prompt: list[int]) -> list[int]:
        if prompt is longest:
            return complete(stack, prompt, started, **options)
        assert started.wait(240)
        return complete(stack, prompt, **options)

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(one, prompts))


@pytest.mark.parametrize(("name", "budget", "blocks"), PLANS)
def test_same_tokens_as_transformers(
    checkpoints: Path, name: str, budget: int, blocks: int
) -> None:
    path, prompts, expected = golden(name, checkpoints)
    with Stack(
        path,
        worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", "1600"],
        prefill=[["--max-num-batched-tokens", str(budget), "--num-kv-blocks", str(BIG)]],
        decode=[["--num-kv-blocks", str(blocks), "--max-num-batched-tokens", str(budget)]],
    ) as stack:
        alone = [complete(stack, prompt) for prompt in prompts[: len(LENGTHS)]]
        assert alone == expected[: len(LENGTHS)]
        assert complete_at_once(stack, prompts[len(LENGTHS) :]) == expected[len(LENGTHS) :]
        stack.assert_idle()
        prefill, decode = stack.metrics("prefill"), stack.metrics("decode")

    # It really disaggregates.
    assert prefill["kvferry_prompt_tokens_computed_total"] == sum(map(len, prompts))
    assert decode["kvferry_prompt_tokens_computed_total"] == 0
    lacked = sum(-(-len(prompt) // B) for prompt in prompts)
    if blocks == BIG:
        assert decode["kvferry_num_preemptions_total"] == 0
        assert decode["kvferry_recomputed_tokens_total"] == 0
    else:
        assert decode["kvferry_num_preemptions_total"] > 0
    moved = lacked * decode["kvferry_kv_block_bytes"]
    assert prefill["kvferry_kv_transfer_bytes_total{direction=sent}"] == moved
    assert decode["kvferry_kv_transfer_bytes_total{direction=received}"] == moved


def test_seeded_sampling_does_not_depend_on_batch_chunks_or_preemption(checkpoints: Path) -> None:
    path, prompts, _ = golden(next(iter(CHECKPOINTS)), checkpoints)
    prompts = prompts[len(LENGTHS) :]
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "presence_penalty": 0.3}
    seen: list[list[list[int]]] = []
    for budget, blocks in ((512, BIG), (B, SMALL)):
        with Stack(
            path,
            worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", "1600"],
            prefill=[["--max-num-batched-tokens", str(budget)]],
            decode=[["--num-kv-blocks", str(blocks)]],
        ) as stack:
            if blocks == BIG:
                seen.append([complete(stack, p, seed=7, **options) for p in prompts])
                other = complete(stack, prompts[0], seed=8, **options)
                assert other != seen[0][0]
            seen.append(complete_at_once(stack, prompts, seed=7, **options))
            stack.assert_idle()
            preemptions = stack.metrics("decode")["kvferry_num_preemptions_total"]
            assert (preemptions > 0) == (blocks == SMALL)
    assert seen[0] == seen[1] == seen[2]


def test_a_second_prompt_moves_only_what_is_new(checkpoints: Path) -> None:
    path, prompts, expected = golden(next(iter(CHECKPOINTS)), checkpoints)
    prompt, answer = prompts[5], expected[5]
    with Stack(path, worker=["--dtype", "float32", "--block-size", str(B)]) as stack:
        assert complete(stack, prompt) == answer
        before = stack.metrics("decode")
        follow_up = prompt + answer + [5, 6, 7]
        assert complete(stack, follow_up) == reference_greedy(path, follow_up, NEW)
        after = stack.metrics("decode")
        name = "kvferry_kv_transfer_bytes_total{direction=received}"
        moved = (after[name] - before[name]) / after["kvferry_kv_block_bytes"]
        assert moved <= -(-3 // B) + 1
