"""Weights as they are computed with: packed, or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.engine import Engine, EngineConfig
from engine.weights import dummy_weights, load_weights, pack_weights
from kernels.linear import QuantizedWeight
from protocol.errors import ConfigError
from protocol.sampling import SamplingParams
from tests.engine.driver import generate

CPU = torch.device("cpu")


def load(path: Path, quantization: str | None) -> Engine:
    config = EngineConfig(str(path), device="cpu", dtype="bfloat16", num_blocks=140)
    return Engine.load(replace(config, quantization=quantization))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_first_token_is_that_of_float32(checkpoint: Callable[[str], Path], name: str) -> None:
    path, prompt = checkpoint(name), list(range(3, 63))
    one = SamplingParams(max_tokens=1, temperature=0.0)
    exact = Engine.load(EngineConfig(str(path), device="cpu", dtype="float32", num_blocks=140))
    expected = generate(exact, [prompt], one)
    assert generate(load(path, None), [prompt], one) == expected
    assert generate(load(path, "int8"), [prompt], one) == expected


def test_tokens_do_not_depend_on_the_batch(checkpoint: Callable[[str], Path]) -> None:
    """What is summed in bf16 or 8 bits, every row is summed alike, alone or among others."""
    engine = load(checkpoint("qwen3"), "int8")
    prompts = [list(range(5, 25)), [7, 8, 9], list(range(90, 20, -1))]
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    together = generate(engine, prompts, sampling)
    assert [generate(engine, [prompt], sampling)[0] for prompt in prompts] == together


def test_workers_that_compute_differently_do_not_share_kv(
    checkpoint: Callable[[str], Path],
) -> None:
    first, second = (load(checkpoint("llama"), choice) for choice in (None, "int8"))
    assert first.fingerprint.weights_digest != second.fingerprint.weights_digest
    assert load(checkpoint("llama"), "int8").fingerprint == second.fingerprint


def test_tied_weights_stay_one(checkpoint: Callable[[str], Path]) -> None:
    config = ModelConfig.load(checkpoint("qwen2"))
    for quantization in (None, "int8"):
        loaded = load_weights(checkpoint("qwen2"), config, torch.bfloat16, CPU)
        weights, _ = pack_weights(*loaded, quantization)  # type: ignore[arg-type]
        assert weights.head is weights.embed
        assert isinstance(weights.head, QuantizedWeight) == (quantization == "int8")
        assert len(weights.layers) == config.num_layers


def test_a_shape_that_8_bits_do_not_allow(checkpoint: Callable[[str], Path]) -> None:
    config = replace(ModelConfig.load(checkpoint("llama")), intermediate_size=30)
    loaded = dummy_weights(config, torch.bfloat16, CPU, 0)
    with pytest.raises(ConfigError, match="quantization int8: a layer of 30 inputs"):
        pack_weights(*loaded, "int8")
