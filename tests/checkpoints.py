"""Tiny seeded checkpoints of every family, written by transformers, and what it generates.

The initial spread is wide enough that greedy output varies; vocabularies are those of a byte-level
tokenizer without merges, so any text and any token id can be served.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

SPECIALS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class CheckpointSpec:
    """One tiny checkpoint: a model type, its settings and how it is stored."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    published_style: bool = False  # rope_theta, rope_scaling, torch_dtype instead of transformers 5
    shard_size: str = "1GB"
    seed: int = 0
    vocab_size: int = 262  # 256 bytes and the specials


def _llama3(**overrides: Any) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        **overrides,
    }


CHECKPOINTS: dict[str, CheckpointSpec] = {
    "llama": CheckpointSpec(
        "llama", {"num_key_value_heads": 2, "head_dim": 64, "rope_parameters": _llama3()}
    ),
    "llama-published": CheckpointSpec(
        "llama",
        {
            "num_key_value_heads": 4,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
        },
        published_style=True,
        shard_size="300KB",
    ),
    "mistral": CheckpointSpec(
        "mistral", {"num_key_value_heads": 1, "head_dim": 64, "sliding_window": 40}
    ),
    "qwen2": CheckpointSpec(
        "qwen2",
        {
            "num_key_value_heads": 2,
            "hidden_size": 256,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 21,
            "max_window_layers": 1,
        },
    ),
    "qwen3": CheckpointSpec(
        "qwen3", {"num_key_value_heads": 1, "head_dim": 128}, published_style=True
    ),
}


def write_checkpoint(spec: CheckpointSpec, directory: Path) -> Path:
    """Write config, weights (float32) and tokenizer into a new ``directory``; returns it."""
    torch.manual_seed(spec.seed)
    config = AutoConfig.for_model(
        spec.model_type,
        **{
            "vocab_size": spec.vocab_size,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "tie_word_embeddings": False,
            **spec.settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _spread(model)
    model.save_pretrained(directory, max_shard_size=spec.shard_size)
    if spec.published_style:
        _publish(directory / "config.json")
    _write_tokenizer(directory)
    return directory


def _spread(model: PreTrainedModel) -> None:
    """Make norms and biases matter, and logits far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.4)  # else tied embeddings repeat the last token
        model.get_output_embeddings().weight.normal_(std=0.5)


def _publish(path: Path) -> None:
    """Rewrite a config.json of transformers 5 in the style publishers use."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def _write_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: token_id for token_id, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@lru_cache(maxsize=2)
def reference_model(path: Path) -> PreTrainedModel:
    """The checkpoint in transformers, float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def reference_greedy(path: Path, prompt_ids: list[int], n: int) -> list[int]:
    """The ``n`` tokens that transformers generates greedily; it does not stop at EOS."""
    settings = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=None)
    prompt = torch.tensor([prompt_ids])
    model = reference_model(path)
    model.generation_config.eos_token_id = None
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
    )
    generated: list[int] = output[0, len(prompt_ids) :].tolist()
    return generated
