"""config.json of both styles gives one shape; what cannot be computed is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig, RopeConfig, SamplingDefaults
from protocol.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 100,
    "max_window_layers": 3,
}


def parse(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.parse({**raw, **changes}, {})


def test_both_styles_of_llama_3_agree() -> None:
    published = parse(
        LLAMA, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, torch_dtype="bfloat16", head_dim=64
    )
    written = parse(
        LLAMA, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}, dtype="bfloat16"
    )
    assert published == written
    assert published.rope == RopeConfig("llama3", 500000.0, 32.0, 1.0, 4.0, 8192)
    assert (published.head_dim, published.num_kv_heads, published.num_layers) == (64, 8, 16)
    assert published.dtype == "bfloat16"
    assert published.tie_word_embeddings
    assert published.windows == (0,) * 16
    assert published.eos_token_ids == (128001, 128008, 128009)


def test_older_spelling_of_linear_scaling() -> None:
    config = parse(LLAMA, rope_scaling={"type": "linear", "factor": 4.0})
    assert config.rope == RopeConfig("linear", 10_000.0, 4.0)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_no_scaling(scaling: dict[str, Any] | None) -> None:
    assert parse(LLAMA, rope_scaling=scaling, rope_theta=7e4).rope == RopeConfig("default", 7e4)


def test_heads_of_the_first_llama_are_not_grouped() -> None:
    raw = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert parse(raw).num_kv_heads == 32


@pytest.mark.parametrize(("window", "expected"), [(4096, 4096), (None, 0)])
def test_mistral_has_one_window_for_all_layers(window: int | None, expected: int) -> None:
    config = parse(LLAMA, architectures=["MistralForCausalLM"], sliding_window=window)
    assert config.windows == (expected,) * 16
    assert not config.qkv_bias


def test_mistral_without_the_key_has_the_family_s_window() -> None:
    assert parse(LLAMA, architectures=["MistralForCausalLM"]).windows == (4096,) * 16


def test_qwen2_windows_by_layer() -> None:
    assert parse(QWEN2).windows == (0, 0, 0, 100)
    assert parse(QWEN2, use_sliding_window=False).windows == (0,) * 4
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert parse(QWEN2, layer_types=kinds).windows == (100, 0, 0, 100)
    assert parse(QWEN2).qkv_bias


def test_qwen3_norms_and_its_own_head_dim() -> None:
    config = parse(QWEN2, architectures=["Qwen3ForCausalLM"], hidden_size=1024)
    assert config.qk_norm
    assert not config.qkv_bias
    assert config.head_dim == 128


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope", "su"])
def test_other_rope_types_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"rope type '{kind}'"):
        parse(LLAMA, rope_scaling={"type": kind, "factor": 4.0})
    with pytest.raises(ConfigError, match=f"rope type '{kind}'"):
        parse(LLAMA, rope_parameters={"rope_type": kind, "factor": 4.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"torch_dtype": "float64"}, "dtype 'float64'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, not -1"),
        ({"num_hidden_layers": "16"}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32, num_key_value_heads 5"),
        ({"head_dim": 33}, "head_dim 33"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "rope type linear without 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LLAMA, **changes)


def test_layer_types_must_fit_the_layers() -> None:
    with pytest.raises(ConfigError, match="2 layer_types for 4 layers"):
        parse(QWEN2, layer_types=["full_attention"] * 2)
    with pytest.raises(ConfigError, match="'chunked_attention'"):
        parse(QWEN2, layer_types=["chunked_attention"] * 4)


def test_generation_config_adds_stop_tokens_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.load(tmp_path).sampling_defaults == SamplingDefaults()
    generation = {"eos_token_id": 7, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = ModelConfig.load(tmp_path)
    assert config.eos_token_ids == (7,)
    assert config.sampling_defaults == SamplingDefaults(temperature=0.6, top_p=0.9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    config = ModelConfig.load(tmp_path)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.sampling_defaults == SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_what_transformers_writes_is_read(checkpoint: Callable[[str], Path]) -> None:
    llama = ModelConfig.load(checkpoint("llama"))
    assert llama.rope == RopeConfig("llama3", 5000.0, 4.0, 1.0, 4.0, 128)
    assert ModelConfig.load(checkpoint("mistral")).windows == (40, 40)
    assert ModelConfig.load(checkpoint("qwen2")).windows == (0, 21)
    assert ModelConfig.load(checkpoint("qwen3")).qk_norm
    assert all(
        ModelConfig.load(checkpoint(name)).eos_token_ids == (257,) for name in ("llama", "qwen3")
    )
