"""Logprobs of output and prompt tokens, against those that transformers' logits give."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import model_runner
from engine.batch import Batch, BatchRow, StepOutput
from engine.engine import Engine, EngineConfig
from engine.logprobs import token_logprobs
from protocol.sampling import SamplingParams, TokenLogprobs
from tests.checkpoints import reference_model
from tests.engine.driver import sequences_for

PROMPTS = ([5, 6, 7, 8] * 9, [3], list(range(70, 100)))
# None of these changes what the model finds probable.
TAMPERED = {
    "temperature": 0.6,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "logit_bias": ((70, 4.0),),
    "seed": 8,
}


@pytest.fixture(scope="module")
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return Engine.load(EngineConfig(str(path), dtype="float32", device="cpu", num_blocks=140))


def run(
    engine: Engine, samplings: list[SamplingParams], budget: int
) -> tuple[list[list[int]], list[StepOutput]]:
    """The tokens of one sequence a prompt, and what each step told."""
    sequences = sequences_for(engine, PROMPTS, samplings[0])
    for sequence, sampling in zip(sequences, samplings, strict=True):
        sequence.sampling = sampling
    told = []
    while running := [s for s in sequences if s.finish_reason() is None]:
        rows = tuple(
            BatchRow(s, s.num_computed, min(budget, s.num_tokens - s.num_computed)) for s in running
        )
        batch = Batch(rows)
        told.append(engine.run(batch))
        for row, token_id in zip(batch.sampling_rows, told[-1].token_ids, strict=True):
            row.sequence.num_computed = row.end
            row.sequence.token_ids.append(token_id)
        for row in rows:
            row.sequence.num_computed = row.end
    return [s.token_ids for s in sequences], told


def reference(path: Path, token_ids: list[int]) -> Tensor:
    """Logprobs after every token, [tokens, vocab]."""
    with torch.inference_mode():
        logits = reference_model(path)(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(-1)


def assert_right(entry: TokenLogprobs, token_id: int, logprobs: Tensor, num_top: int) -> None:
    assert entry.logprob == pytest.approx(float(logprobs[token_id]), abs=2e-4)
    best = logprobs.sort(descending=True)
    assert [token for token, _ in entry.top] == best.indices[:num_top].tolist()
    values = [value for _, value in entry.top]
    assert values == pytest.approx(best.values[:num_top].tolist(), abs=2e-4)
    assert best.indices[entry.rank - 1] == token_id


@pytest.mark.parametrize("budget", [1000, 7])
def test_logprobs_are_those_of_transformers(path: Path, engine: Engine, budget: int) -> None:
    asks = [(0, 3), (2, 0), (20, None)]  # alternatives of output and of prompt tokens
    samplings = [
        SamplingParams(max_tokens=6, logprobs=output, prompt_logprobs=prompt, **TAMPERED)
        for output, prompt in asks
    ]
    sequences, told = run(engine, samplings, budget)
    for number, (prompt, token_ids) in enumerate(zip(PROMPTS, sequences, strict=True)):
        (num_output, num_prompt), name = asks[number], f"request-{number}"
        expected = reference(path, token_ids)
        entries = [step.logprobs[name] for step in told if name in step.logprobs]
        assert len(entries) == 6
        for position, entry in enumerate(entries, start=len(prompt)):
            assert_right(entry, token_ids[position], expected[position - 1], num_output)
        scored = [e for step in told for e in step.prompt_logprobs.get(name, [])]
        assert len(scored) == (0 if num_prompt is None else len(prompt) - 1)
        for position, entry in enumerate(scored, start=1):
            assert_right(entry, token_ids[position], expected[position - 1], num_prompt or 0)


def test_asking_changes_no_token_and_who_does_not_ask_hears_nothing(engine: Engine) -> None:
    plain = [SamplingParams(max_tokens=8, seed=4)] * 3
    expected, told = run(engine, plain, 1000)
    assert not any(step.logprobs or step.prompt_logprobs for step in told)
    asking = [*plain[:2], plain[2].model_copy(update={"logprobs": 4, "prompt_logprobs": 4})]
    tokens, told = run(engine, asking, 1000)
    assert tokens == expected
    assert {name for step in told for name in step.logprobs} == {"request-2"}
    assert {name for step in told for name in step.prompt_logprobs} == {"request-2"}


def test_the_prompts_logits_are_not_in_memory_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(logits: Tensor, *arguments: list[int]) -> list[TokenLogprobs]:
        seen.append(len(logits))
        return token_logprobs(logits, *arguments)

    monkeypatch.setattr(model_runner, "SCORED_AT_ONCE", 10)
    monkeypatch.setattr(model_runner, "token_logprobs", spy)
    run(engine, [SamplingParams(max_tokens=1, prompt_logprobs=1)] * 3, 1000)
    assert max(seen) == 10
    assert sum(seen) == sum(len(prompt) - 1 for prompt in PROMPTS)


def test_an_output_that_another_worker_began_leaves_its_prompt_alone(engine: Engine) -> None:
    [sequence] = sequences_for(engine, [[1, 2, 3, 4]], SamplingParams(max_tokens=9))
    sequence.sampling = SamplingParams(max_tokens=9, prompt_logprobs=1)
    sequence.num_prompt_tokens = 3
    assert not engine.run(Batch((BatchRow(sequence, 0, 4),))).prompt_logprobs


def test_equals_rank_alike_and_there_are_no_more_alternatives_than_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0]])
    [entry] = token_logprobs(logits, [1], [20])
    total = math.log(2 + math.e)
    assert (entry.rank, len(entry.top)) == (2, 3)
    assert entry.top[0] == (2, pytest.approx(1 - total, abs=1e-6))
    assert entry.logprob == pytest.approx(-total, abs=1e-6)
