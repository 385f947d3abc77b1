"""Rotary frequencies are those of transformers, and their text tells parameters apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import RopeConfig
from engine.rope import canonical_text, inverse_frequencies, rope_table

CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig("default", 500000.0), {"rope_type": "default", "rope_theta": 500000.0}),
    (RopeConfig("linear", 1e4, 8.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
    (
        RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), CASES, ids=lambda case: getattr(case, "type", ""))
def test_frequencies_and_table_are_those_of_transformers(
    rope: RopeConfig, parameters: dict[str, Any]
) -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    reference = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(
        inverse_frequencies(rope, 128), reference.inv_freq, rtol=1e-6, atol=0.0
    )
    cos, sin = rope_table(rope, 128, 3000)
    expected = reference(torch.zeros(1), torch.arange(3000).unsqueeze(0))
    for table, want in zip((cos, sin), expected, strict=True):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, want[0, :, :64], rtol=0.0, atol=5e-4)


def test_the_text_tells_parameters_apart() -> None:
    texts = {canonical_text(rope) for rope, _ in CASES}
    texts.add(canonical_text(RopeConfig("default", 500001.0)))
    assert len(texts) == 4
    assert canonical_text(RopeConfig()) == canonical_text(RopeConfig("default", 10_000.0))
