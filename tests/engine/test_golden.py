"""The engine generates the tokens that transformers generates, however the work is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import model_runner
from engine.engine import Engine, EngineConfig
from protocol.sampling import SamplingParams
from tests.checkpoints import CHECKPOINTS, reference_greedy, reference_model
from tests.engine.driver import GREEDY, generate, sequences_for, step

B = 16  # tokens in a block
LENGTHS = (1, B - 1, B, B + 1, 2 * B, 4 * B + 3, 600)
NAMES = sorted(CHECKPOINTS)


def load(path: Path, **options: object) -> Engine:
    defaults = {"dtype": "float32", "device": "cpu", "block_size": B, "num_blocks": 140}
    return Engine.load(EngineConfig(str(path), **{**defaults, **options}))  # type: ignore[arg-type]


def prompts_for(name: str, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(name)
    return [[rng.randrange(CHECKPOINTS[name].vocab_size) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_those_of_transformers(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    path, prompts = checkpoint(name), prompts_for(name)
    expected = [reference_greedy(path, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 50  # worth comparing
    engine = load(path)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(engine, [prompt], order=len(prompt)) == [tokens]
    for budget in (B, 50, 10_000):
        assert generate(engine, prompts, budget=budget, order=budget) == expected
    # The longest first: rows that end their prompt stand before rows that decode.
    assert generate(engine, prompts[::-1], budget=50) == expected[::-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1, 19, 10_000])
def test_logits_are_close_to_those_of_transformers(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, budget: int
) -> None:
    seen: list[Tensor] = []
    choose = model_runner.sample

    def record(logits: Tensor, *arguments: object) -> list[int]:
        seen.append(logits.clone())
        return choose(logits, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(model_runner, "sample", record)
    path = checkpoint(name)
    (prompt,) = prompts_for(name, (70,))
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    (tokens,) = generate(load(path), [prompt], sampling, budget=budget)
    with torch.inference_mode():
        expected = reference_model(path)(torch.tensor([prompt + tokens])).logits[
            0, len(prompt) - 1 : -1
        ]
    logits = torch.cat([rows for rows in seen if len(rows)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_block_size_does_not_change_the_tokens(checkpoint: Callable[[str], Path]) -> None:
    path, (prompt,) = checkpoint("mistral"), prompts_for("mistral", (100,))
    expected = reference_greedy(path, prompt, GREEDY.max_tokens)
    for block_size in (8, 64):
        assert generate(load(path, block_size=block_size, num_blocks=260), [prompt], budget=33) == [
            expected
        ]


def test_a_sequence_computed_again_goes_on_with_the_same_tokens(
    checkpoint: Callable[[str], Path],
) -> None:
    path, prompts = checkpoint("llama"), prompts_for("llama", (40, 70))
    engine = load(path)
    expected = generate(engine, prompts)
    sequences = sequences_for(engine, prompts, GREEDY)
    while sequences[0].num_output_tokens < 30:
        step(engine, sequences, budget=1000)
    engine.rows.zero_()  # both lose their KV, and their progress
    for sequence in sequences:
        sequence.num_computed = 0
    while sequences[1].num_output_tokens < GREEDY.max_tokens:
        step(engine, sequences, budget=45)
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == expected


def test_seeded_tokens_do_not_depend_on_batch_or_chunks(checkpoint: Callable[[str], Path]) -> None:
    path, prompts = checkpoint("qwen3"), prompts_for("qwen3", (5, 33, 90))
    engine = load(path)
    sampling = SamplingParams(
        max_tokens=40,
        temperature=1.2,
        top_p=0.9,
        top_k=40,
        presence_penalty=0.4,
        seed=(1 << 64) - 3,
    )
    together = generate(engine, prompts, sampling)
    assert [generate(engine, [prompt], sampling)[0] for prompt in prompts] == together
    assert generate(engine, prompts, sampling, budget=7, order=3) == together
    other = generate(engine, prompts, sampling.model_copy(update={"seed": 4}))
    assert other != together


def test_half_precision_stays_near_float32(checkpoint: Callable[[str], Path]) -> None:
    path, (prompt,) = checkpoint("llama"), prompts_for("llama", (60,))
    one = SamplingParams(max_tokens=1, temperature=0.0)
    expected = generate(load(path), [prompt], one)
    assert generate(load(path, dtype="bfloat16"), [prompt], one) == expected
    assert generate(load(path, dtype="float16"), [prompt], one) == expected
