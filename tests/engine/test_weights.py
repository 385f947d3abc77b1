"""Weights: what a checkpoint must hold, and a digest that names its content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.weights import EMBED, HEAD, ModelWeights, dummy_weights, load_weights
from protocol.errors import ConfigError
from tests.checkpoints import CHECKPOINTS, write_checkpoint

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelWeights, str]:
    return load_weights(folder, ModelConfig.load(folder), dtype, CPU)


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def rewritten(source: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of the checkpoint that holds ``tensors`` in a single file."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "m.safetensors")
    return folder


def test_fused_tensors_hold_the_published_ones_in_order(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("qwen2")
    tensors, (weights, _) = stored(folder), load(folder)
    prefix = "model.layers.1."
    layer = weights.layers[1]
    for kind, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        assert fused is not None
        parts = [tensors[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv"]
        assert torch.equal(fused, torch.cat(parts))
    parts = [tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(parts))
    assert weights.head is weights.embed  # tied
    assert torch.equal(weights.embed, tensors[EMBED])


def test_sharding_and_place_do_not_change_the_digest(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama-published")
    assert len(list(folder.glob("*.safetensors"))) > 2
    weights, digest = load(folder)
    single, same_digest = load(rewritten(folder, tmp_path / "single", stored(folder)))
    assert digest == same_digest
    assert torch.equal(weights.layers[1].qkv, single.layers[1].qkv)


def test_one_changed_byte_changes_the_digest(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("mistral"), tmp_path / "copy")
    _, digest = load(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load(folder)[1] != digest


def test_the_digest_covers_what_else_shapes_the_kv(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mistral")
    config = ModelConfig.load(folder)
    digests = {
        load_weights(folder, changed, dtype, CPU)[1]
        for changed, dtype in (
            (config, torch.float32),
            (config, torch.bfloat16),
            (replace(config, rms_norm_eps=1e-3), torch.float32),
            (replace(config, windows=(40, 0)), torch.float32),
        )
    }
    assert len(digests) == 4


def test_weights_are_converted(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    weights, _ = load(folder, torch.bfloat16)
    expected = stored(folder)["model.layers.0.mlp.down_proj.weight"].bfloat16()
    assert torch.equal(weights.layers[0].down, expected)


def test_missing_and_unexpected_tensors_are_named(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    tensors = stored(source)
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors.pop(Q_PROJ)
    folder = rewritten(source, tmp_path / "renamed", tensors)
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert f"{Q_PROJ} is missing" in str(error.value)
    assert "model.layers.0.self_attn.q_proj.bias is unexpected" in str(error.value)


def test_many_missing_tensors_are_counted(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    folder = rewritten(source, tmp_path / "head", {HEAD: stored(source)[HEAD]})
    with pytest.raises(ConfigError, match="and 15 more"):
        load(folder)


def test_shape_and_type_are_checked(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    tensors = stored(source)
    tensors[Q_PROJ] = tensors[Q_PROJ][:-1]
    tensors[EMBED] = tensors[EMBED].to(torch.int8)
    with pytest.raises(ConfigError) as error:
        load(rewritten(source, tmp_path / "wrong", tensors))
    assert f"{Q_PROJ} has shape (255, 128), config.json says (256, 128)" in str(error.value)
    assert f"{EMBED} has type I8" in str(error.value)


def test_computed_tensors_of_old_checkpoints_are_ignored(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    tensors = stored(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    folder = rewritten(source, tmp_path / "old", tensors)
    assert load(folder)[1] == load(source)[1]


def test_a_tied_head_may_be_stored_again_but_another_head_is_used(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen2")
    tensors = stored(source)
    again = rewritten(source, tmp_path / "again", {**tensors, HEAD: tensors[EMBED]})
    weights, digest = load(again)
    assert weights.head is weights.embed
    assert digest == load(source)[1]
    another = rewritten(source, tmp_path / "another", {**tensors, HEAD: -tensors[EMBED]})
    weights, digest = load(another)
    assert torch.equal(weights.head, -weights.embed)
    assert digest != load(source)[1]


def test_a_tensor_in_two_files_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewritten(checkpoint("llama"), tmp_path / "twice", stored(checkpoint("llama")))
    shutil.copy(folder / "m.safetensors", folder / "n.safetensors")
    with pytest.raises(ConfigError, match=r"is in both m\.safetensors and n\.safetensors"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 100])
def test_broken_files_are_named(
    checkpoint: Callable[[str], Path], tmp_path: Path, content: bytes
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load(folder)


def test_a_truncated_file_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load(folder)


def test_no_weights_at_all(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        load(tmp_path)


def test_dummy_weights_depend_on_the_seed_alone(checkpoint: Callable[[str], Path]) -> None:
    config = ModelConfig.load(checkpoint("qwen3"))
    first, digest = dummy_weights(config, torch.float32, CPU, 1)
    again, same_digest = dummy_weights(config, torch.float32, CPU, 1)
    other, other_digest = dummy_weights(config, torch.float32, CPU, 2)
    assert digest == same_digest != other_digest
    assert digest != load(checkpoint("qwen3"))[1]
    assert torch.equal(first.layers[1].qkv, again.layers[1].qkv)
    assert not torch.equal(first.layers[1].qkv, other.layers[1].qkv)
    assert not torch.equal(first.layers[0].down, first.layers[1].down)
    assert torch.equal(first.norm, torch.ones(config.hidden_size))


def test_dummy_weights_have_the_spread_of_an_untrained_model(
    checkpoint: Callable[[str], Path],
) -> None:
    config = replace(ModelConfig.load(checkpoint("llama")), vocab_size=20_000)
    weights, _ = dummy_weights(config, torch.float32, CPU, 0)
    assert weights.embed.numel() > 2 * 1_048_573  # more than the block that is repeated
    assert weights.embed.std().item() == pytest.approx(config.hidden_size**-0.5, rel=0.01)
    assert len(torch.unique(weights.embed[:, 0])) > 19_000


def test_every_family_stores_what_the_engine_expects(tmp_path: Path) -> None:
    for name, spec in CHECKPOINTS.items():
        load(write_checkpoint(replace(spec, seed=9), tmp_path / name))
