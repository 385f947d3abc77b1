"""A checkpoint with random weights, for measuring engines that must all load the same one.

    python -m bench.models FOLDER

Qwen3's architecture with about 0.47 B parameters in bfloat16: 28 layers of hidden size 1024, 16
query and 8 KV heads of 128, tied embeddings. The tokenizer's words are the numbers of its tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BEGIN, END = "<s>", "</s>"


def main(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    layers: Annotated[int, typer.Option(help="Transformer layers.", min=1)] = 28,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write config.json, model.safetensors and a tokenizer."""
    write_shape(folder, {**CONFIG, "num_hidden_layers": layers})
    save_file(random_weights(layers, seed), folder / "model.safetensors", {"format": "pt"})


def write_shape(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint without its weights: config.json and a tokenizer of ``vocab_size`` words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    words = {str(index): index for index in range(2, config["vocab_size"])}
    words |= {BEGIN: config["bos_token_id"], END: config["eos_token_id"]}
    tokenizer = Tokenizer(WordLevel(words, unk_token=BEGIN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def random_weights(layers: int, seed: int) -> dict[str, torch.Tensor]:
    """Normal weights of variance 1 / inputs, under their published names."""
    random = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        weight: torch.Tensor = torch.randn(outputs, inputs, generator=random) * inputs**-0.5
        return weight.to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, inner, head_dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries = CONFIG["num_attention_heads"] * head_dim
    kv = CONFIG["num_key_value_heads"] * head_dim
    weights = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], hidden),
        "model.norm.weight": ones(hidden),
    }
    for layer in range(layers):
        parts = {
            "input_layernorm": ones(hidden),
            "self_attn.q_proj": matrix(queries, hidden),
            "self_attn.k_proj": matrix(kv, hidden),
            "self_attn.v_proj": matrix(kv, hidden),
            "self_attn.o_proj": matrix(hidden, queries),
            "self_attn.q_norm": ones(head_dim),
            "self_attn.k_norm": ones(head_dim),
            "post_attention_layernorm": ones(hidden),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return weights


if __name__ == "__main__":
    typer.run(main)
