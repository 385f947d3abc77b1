"""What steps need beside weights and KV, and what that leaves for KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import memory
from engine.config import ModelConfig
from engine.model import Model
from engine.model_runner import ModelRunner
from engine.weights import load_weights, pack_weights

GIB = 1 << 30


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Model:
    folder = checkpoint("llama")
    config = ModelConfig.load(folder)
    weights, _ = pack_weights(
        *load_weights(folder, config, torch.float32, torch.device("cpu")), None
    )
    return Model(config, weights, max_model_len=128)


def one_block(model: Model) -> torch.Tensor:
    config = model.config
    return torch.zeros(1, config.num_kv_heads, config.num_layers, 2, 16, config.head_dim)


@pytest.mark.parametrize(
    ("rows", "tokens", "longest", "each"),
    [(1, 100, 128, 100), (4, 100, 128, 25), (3, 100, 128, 34), (2, 1000, 128, 128), (5, 5, 128, 1)],
)
def test_the_largest_batch_runs_in_one_block(
    model: Model, rows: int, tokens: int, longest: int, each: int
) -> None:
    batch = memory.largest_batch(rows, tokens, longest)
    assert [row.num_tokens for row in batch.rows] == [each] * rows
    assert len(ModelRunner(model, one_block(model)).run(batch).token_ids) == rows


@pytest.mark.parametrize(("graph_rows", "expected"), [(0, [24]), (4, [24, 4])])
def test_the_workspace_is_that_of_the_largest_steps(
    model: Model, monkeypatch: pytest.MonkeyPatch, graph_rows: int, expected: list[int]
) -> None:
    steps = []
    run = ModelRunner.run

    def watched(runner: ModelRunner, batch: memory.Batch) -> list[int]:
        steps.append(batch.num_tokens)
        return run(runner, batch)

    def peak_of(work: Callable[[], None]) -> int:
        work()
        return 1000 * steps[-1]

    monkeypatch.setattr(ModelRunner, "run", watched)
    monkeypatch.setattr(memory, "_peak_of", peak_of)
    workspace = memory.step_workspace(
        model, one_block(model), max_num_seqs=4, max_num_batched_tokens=20, graph_rows=graph_rows
    )
    assert steps == expected
    assert workspace == 1000 * sum(expected)


@pytest.mark.parametrize(
    ("utilization", "free", "expected"),
    [
        (0.5, 70, 40 - 20 - 3 - 1),  # of the share: less the weights, a step and the margin
        (0.9, 30, 30 - 3 - 1),  # others hold the rest of the share
        (0.2, 70, 16 - 20 - 3 - 1),
    ],
)
def test_what_is_left_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, utilization: float, free: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20 * GIB)
    budget = memory.gpu_budget(utilization, 3 * GIB, torch.device("cuda"))
    assert budget == expected * GIB
