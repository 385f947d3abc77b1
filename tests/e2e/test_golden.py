"""The main test: router → prefill → KV over UCX → decode gives the tokens transformers gives.

Separate processes, real UCX, real HTTP; fp32, greedy, 64 tokens. Each run also shows from the
workers' metrics that KV moved, no more and no less than decode lacked, and that decode computed
no prompt token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event

import pytest

from tests.checkpoints import CHECKPOINTS, reference_greedy, write_checkpoint
from tests.stack import Stack, scrape

B = 16  # tokens in a block
NEW = 64  # tokens generated
LENGTHS = (1, B - 1, B, B + 1, 2 * B, 4 * B + 3, 1500)
AT_ONCE = (*LENGTHS, *LENGTHS[:-1], 9 * B, 12 * B + 1, 20 * B)
# Blocks. SMALL just holds the longest prompt with its output. The growing requests start with 13
# blocks each and end with 43, more than the router expects of them: in SMALL they drive each other
# out, however fast it goes.
BIG, SMALL = 2000, 98
MAX_LEN = SMALL * B
GROWING, GROWN = (200, 200, 200), 480

PATIENT = ["--max-queue-time", "240"]  # the long prompt waits for the whole of SMALL

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


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that transformers generates after it."""

    prompt: list[int]
    expected: list[int]


@dataclass(frozen=True)
class Golden:
    """A checkpoint and its cases: each alone, all at once, and with more output beside those."""

    path: Path
    alone: list[Case]
    at_once: list[Case]
    growing: list[Case]

    @property
    def prompts(self) -> list[list[int]]:
        """All prompts, no two alike."""
        return [case.prompt for case in (*self.alone, *self.at_once, *self.growing)]


@cache
def golden(name: str, directory: Path) -> Golden:
    """Write the checkpoint and ask transformers."""
    spec = CHECKPOINTS[name]
    path = write_checkpoint(spec, directory / name)
    rng = random.Random(name)

    def cases(lengths: Iterable[int], new: int) -> list[Case]:
        prompts = [[rng.randrange(spec.vocab_size) for _ in range(n)] for n in lengths]
        return [Case(prompt, reference_greedy(path, prompt, new)) for prompt in prompts]

    return Golden(path, cases(LENGTHS, NEW), cases(AT_ONCE, NEW), cases(GROWING, GROWN))


def complete(
    stack: Stack, prompt: list[int], new: int = NEW, started: Event | None = None, **options: object
) -> list[int]:
    """Stream a completion's token ids; ``started`` is set once the first has come."""
    body = {
        "model": "test",
        "prompt": prompt,
        "max_tokens": new,
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
    assert usage["usage"]["completion_tokens"] == new
    for chunk in chunks:
        token_ids += chunk["choices"][0]["token_ids"]
    return token_ids


def _noting(lines: Iterator[str], started: Event | None) -> Iterator[str]:
    for line in lines:
        if started is not None:
            started.set()
        yield line


def complete_all(
    stack: Stack, at_once: list[Case], growing: list[Case], **options: object
) -> list[list[int]]:
    """The growing ones first; once they generate, all others at the same time."""
    with ThreadPoolExecutor(len(at_once) + len(growing)) as threads:
        running = []
        for case in growing:
            started = Event()
            arguments = (stack, case.prompt, GROWN, started)
            running.append((started, threads.submit(complete, *arguments, **options)))
        for started, _ in running:
            assert started.wait(240)
        others = [threads.submit(complete, stack, case.prompt, **options) for case in at_once]
        return [answer.result() for answer in (*others, *(answer for _, answer in running))]


@pytest.mark.parametrize(("name", "budget", "blocks"), PLANS)
def test_same_tokens_as_transformers(
    checkpoints: Path, name: str, budget: int, blocks: int
) -> None:
    cases = golden(name, checkpoints)
    with Stack(
        cases.path,
        worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", str(MAX_LEN)],
        prefill=[["--max-num-batched-tokens", str(budget), "--num-kv-blocks", str(BIG)]],
        decode=[["--num-kv-blocks", str(blocks), "--max-num-batched-tokens", str(budget)]],
        router=PATIENT,
    ) as stack:
        for case in cases.alone:
            assert complete(stack, case.prompt) == case.expected
        together = complete_all(stack, cases.at_once, cases.growing)
        assert together == [case.expected for case in (*cases.at_once, *cases.growing)]
        stack.assert_idle()
        prefill, decode = stack.metrics("prefill"), stack.metrics("decode")

    # It really disaggregates.
    assert prefill["kvferry_prompt_tokens_computed_total"] == sum(map(len, cases.prompts))
    assert decode["kvferry_prompt_tokens_computed_total"] == 0
    if blocks == BIG:
        assert decode["kvferry_num_preemptions_total"] == 0
        assert decode["kvferry_recomputed_tokens_total"] == 0
    else:
        assert decode["kvferry_num_preemptions_total"] > 0
    lacked = sum(-(-len(prompt) // B) for prompt in cases.prompts)
    moved = lacked * decode["kvferry_kv_block_bytes"]
    assert prefill["kvferry_kv_transfer_bytes_total{direction=sent}"] == moved
    assert decode["kvferry_kv_transfer_bytes_total{direction=received}"] == moved


@pytest.mark.parametrize(("name", "budget", "blocks"), [("llama", B, SMALL), ("qwen3", 64, BIG)])
def test_decode_alone_gives_the_same_tokens(
    checkpoints: Path, name: str, budget: int, blocks: int
) -> None:
    """The colocated mode."""
    cases = golden(name, checkpoints)
    with Stack(
        cases.path,
        worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", str(MAX_LEN)],
        prefill=[],
        decode=[["--num-kv-blocks", str(blocks), "--max-num-batched-tokens", str(budget)]],
        router=PATIENT,
    ) as stack:
        assert stack.client.get("/ready").json()["colocated"]
        for case in cases.alone:
            assert complete(stack, case.prompt) == case.expected
        together = complete_all(stack, cases.at_once, cases.growing)
        assert together == [case.expected for case in (*cases.at_once, *cases.growing)]
        stack.assert_idle()
        decode, router = stack.metrics("decode"), scrape(f"{stack.url}/metrics", stack.client)
    assert router["kvferry_requests_path_total{path=local}"] == len(cases.prompts)
    assert decode["kvferry_kv_transfer_bytes_total{direction=received}"] == 0
    if blocks == BIG:
        assert decode["kvferry_prompt_tokens_computed_total"] == sum(map(len, cases.prompts))
        assert decode["kvferry_recomputed_tokens_total"] == 0
    else:
        assert decode["kvferry_num_preemptions_total"] > 0


def test_both_paths_give_the_same_tokens_side_by_side(checkpoints: Path) -> None:
    """Short prompts are decode's own, long ones are handed off, in one batch."""
    cases = golden("llama", checkpoints)
    with Stack(
        cases.path,
        worker=["--dtype", "float32", "--block-size", str(B)],
        router=["--disaggregation", "auto", "--local-prefill-tokens", str(2 * B)],
    ) as stack:
        for case in cases.alone:
            assert complete(stack, case.prompt) == case.expected
        assert complete_all(stack, cases.at_once, []) == [c.expected for c in cases.at_once]
        stack.assert_idle()
        paths = scrape(f"{stack.url}/metrics", stack.client)
    # Alone the short ones are all decode's; at once only those that find it without a prompt.
    assert paths["kvferry_requests_path_total{path=local}"] >= 5
    assert paths["kvferry_requests_path_total{path=remote}"] >= 2


def test_over_mapped_memory(checkpoints: Path) -> None:
    """As in production on one host; every other test goes over UCX."""
    cases = golden("llama", checkpoints)
    worker = ["--dtype", "float32", "--block-size", str(B), "--require-transport", "memory"]
    with Stack(cases.path, worker=worker, transport="auto") as stack:
        for case in cases.alone:
            assert complete(stack, case.prompt) == case.expected
        stack.assert_idle()
        used = [name for name in stack.metrics("prefill") if "transport_info" in name]
    assert any("transport=memory/memfd" in name for name in used)


def test_seeded_sampling_does_not_depend_on_batch_chunks_or_preemption(checkpoints: Path) -> None:
    cases = golden("llama", checkpoints)
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "presence_penalty": 0.3, "seed": 7}
    seen: list[list[list[int]]] = []
    for budget, blocks in ((512, BIG), (B, SMALL)):
        with Stack(
            cases.path,
            worker=["--dtype", "float32", "--block-size", str(B), "--max-model-len", str(MAX_LEN)],
            prefill=[["--max-num-batched-tokens", str(budget)]],
            decode=[["--num-kv-blocks", str(blocks)]],
            router=PATIENT,
        ) as stack:
            if blocks == BIG:
                alone = [complete(stack, case.prompt, **options) for case in cases.at_once]
                alone += [complete(stack, case.prompt, GROWN, **options) for case in cases.growing]
                seen.append(alone)
                assert complete(stack, cases.at_once[0].prompt, **options | {"seed": 8}) != alone[0]
            seen.append(complete_all(stack, cases.at_once, cases.growing, **options))
            stack.assert_idle()
            preemptions = stack.metrics("decode")["kvferry_num_preemptions_total"]
            assert (preemptions > 0) == (blocks == SMALL)
    assert seen[0] == seen[1] == seen[2]


def test_a_second_prompt_moves_only_what_is_new(checkpoints: Path) -> None:
    cases = golden("llama", checkpoints)
    case = cases.alone[5]
    with Stack(cases.path, worker=["--dtype", "float32", "--block-size", str(B)]) as stack:
        assert complete(stack, case.prompt) == case.expected
        before = stack.metrics("decode")
        follow_up = [*case.prompt, *case.expected, 5, 6, 7]
        assert complete(stack, follow_up) == reference_greedy(cases.path, follow_up, NEW)
        after = stack.metrics("decode")
        name = "kvferry_kv_transfer_bytes_total{direction=received}"
        moved = (after[name] - before[name]) / after["kvferry_kv_block_bytes"]
        assert moved <= -(-3 // B) + 1
