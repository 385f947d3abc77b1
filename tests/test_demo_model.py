"""The bundled demo model is a well-formed checkpoint: its files agree with each other.

Nothing is generated here; serving the model is tested elsewhere.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[1] / "cli" / "demo_model"
MARKS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    config = read("tokenizer_config.json")
    template = jinja2.Environment().from_string(config["chat_template"])
    return template.render(
        messages=messages,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
        add_generation_prompt=add_generation_prompt,
    )


def test_the_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert files.keys() == {
        "LICENSE.txt",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) < 12_000_000


def test_the_card_names_corpus_and_licence() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "PSF" in card
    assert "Python Software Foundation" in card
    assert "python bench/train_demo_model.py --out cli/demo_model" in card
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE.txt").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "What does os.path.join do?",
        "def f(x):\n    return x  # two  spaces\n",
        "naïve café, 東京, 🚢",
        "",
        " leading and trailing ",
        "\x00\t\r\n",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_plain_text_starts_with_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("len").ids[0] == read("config.json")["bos_token_id"]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_are_single_special_tokens(tokenizer: Tokenizer, mark: str) -> None:
    ids = tokenizer.encode(mark, add_special_tokens=False).ids
    assert len(ids) == 1
    assert tokenizer.decode(ids) == ""


def test_the_template_renders_every_role() -> None:
    messages = [
        {"role": "system", "content": "Be concise."},
        {"role": "user", "content": " What does len do? "},
        {"role": "assistant", "content": "It counts."},
        {"role": "user", "content": "Thanks!"},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<|bos|><|system|>Be concise.<|end|><|user|>What does len do?<|end|>"
        "<|assistant|>It counts.<|eos|><|user|>Thanks!<|end|><|assistant|>"
    )
    assert not render(messages, add_generation_prompt=False).endswith("<|assistant|>")


def test_token_ids_agree_across_files(tokenizer: Tokenizer) -> None:
    config, generation = read("config.json"), read("generation_config.json")
    marks = read("tokenizer_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(marks["bos_token"]) == config["bos_token_id"]
    assert tokenizer.token_to_id(marks["eos_token"]) == config["eos_token_id"]
    assert generation["bos_token_id"] == config["bos_token_id"]
    assert config["eos_token_id"] in generation["eos_token_id"]
    assert tokenizer.token_to_id("<|end|>") in generation["eos_token_id"]
    assert marks["model_max_length"] == config["max_position_embeddings"]


def test_tensors_are_those_the_config_describes() -> None:
    c = read("config.json")
    assert c["architectures"] == ["LlamaForCausalLM"]
    assert c["tie_word_embeddings"] is True
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    queries = c["num_attention_heads"] * c["head_dim"]
    keys = c["num_key_value_heads"] * c["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    expected = {
        "model.embed_tokens.weight": [c["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for index in range(c["num_hidden_layers"]):
        expected |= {f"model.layers.{index}.{name}.weight": s for name, s in layer.items()}
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: s.get_shape() for name, s in slices.items()} == expected
        assert {s.get_dtype() for s in slices.values()} == {"BF16"}
