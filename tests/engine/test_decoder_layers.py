"""Decode steps in one native call give what the same layers give part by part, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.engine import Engine, EngineConfig
from engine.model import Model
from kernels.cpu import library
from protocol.sampling import SamplingParams
from tests.checkpoints import CHECKPOINTS
from tests.engine.driver import sequences_for, step

pytestmark = pytest.mark.skipif(library.load() is None, reason="needs the native library")

CASES = [("bfloat16", "int8"), ("float32", "int8"), ("float16", "int8")]
if library.load_for_products() is not None:
    CASES.append(("bfloat16", None))
SAMPLING = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[7], list(range(5, 45)), list(range(90, 20, -1))]
BUDGET = 50  # so that some steps hold both prompts and new tokens


def computed(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, parts: bool, **options: object
) -> tuple[list[Tensor], Tensor, int]:
    """Every step's hidden states, the KV at the end, and how many steps were one native call."""
    config = EngineConfig(str(path), device="cpu", num_blocks=140, **options)  # type: ignore[arg-type]
    engine = Engine.load(config)
    model = engine._runner._model
    seen: list[Tensor] = []
    calls = 0
    native = model._native
    assert native is not None

    def count(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        return native(*arguments)  # type: ignore[arg-type]

    def watched(of: Model, *arguments: object) -> Tensor:
        seen.append(hidden(of, *arguments))  # type: ignore[arg-type]
        return seen[-1]

    hidden = Model.hidden
    model._native = None if parts else count  # type: ignore[assignment]
    with monkeypatch.context() as patches:
        patches.setattr(Model, "hidden", watched)
        torch.manual_seed(0)  # of what blocks hold before
        sequences = sequences_for(engine, PROMPTS, SAMPLING)
        while any(s.num_output_tokens < SAMPLING.max_tokens for s in sequences):
            step(engine, sequences, BUDGET)
    return seen, engine.rows, calls


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
@pytest.mark.parametrize(("dtype", "quantization"), CASES)
def test_one_call_computes_what_the_parts_do(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: str,
    quantization: str | None,
) -> None:
    options = {"dtype": dtype, "quantization": quantization}
    at_once, rows, calls = computed(checkpoint(name), monkeypatch, parts=False, **options)
    expected, expected_rows, none = computed(checkpoint(name), monkeypatch, parts=True, **options)
    assert none == 0
    assert SAMPLING.max_tokens - 3 < calls < len(at_once), "decode steps, but for those of prompts"
    assert len(at_once) == len(expected)
    for hidden, other in zip(at_once, expected, strict=True):
        assert torch.equal(hidden, other)
    assert torch.equal(rows, expected_rows)


def test_a_profile_sees_the_parts(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        *_, calls = computed(checkpoint("qwen3"), monkeypatch, parts=False, quantization="int8")
    assert calls == 0
    assert "attention" in {event.key for event in profile.key_averages()}
