"""Weights: their fused layout in memory, and filling it from safetensors or from a seed.

Owns the mapping from published tensor names to places in the fused tensors. Each tensor is copied
straight from the mapped file to its place, so there is never a second copy of the weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig
from kernels.cpu.memory import on_huge_pages
from kernels.linear import Weight, pack, quantize
from protocol.errors import ConfigError

LoadFormat = Literal["auto", "dummy"]
Quantization = Literal["int8"]
Matrix = TypeVar("Matrix", Tensor, Weight)  # as loaded, or as computed with

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# In old Llama checkpoints: computed, not learned.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
STORED_DTYPES = ("F32", "F16", "BF16")
DUMMY_PERIOD = 1_048_573  # prime, so that a matrix's rows do not repeat each other
MAX_READERS = 8  # threads
MAX_NAMED = 5  # tensors named in an error


@dataclass(slots=True, eq=False)
class LayerWeights(Generic[Matrix]):
    """One transformer layer; matrices are [out features, in features]."""

    attention_norm: Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 * kv heads) * head_dim, hidden]: q, then k, then v
    qkv_bias: Tensor | None  # [(heads + 2 * kv heads) * head_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Matrix  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Matrix  # [2 * intermediate, hidden]: gate, then up
    down: Matrix  # [hidden, intermediate]


@dataclass(slots=True, eq=False)
class ModelWeights(Generic[Matrix]):
    """A whole model. ``head is embed`` when the two are tied."""

    embed: Matrix  # [vocab, hidden]
    layers: list[LayerWeights[Matrix]]
    norm: Tensor  # [hidden]
    head: Matrix  # [vocab, hidden]


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[ModelWeights[Tensor], str]:
    """Read the safetensors files of ``folder``; also the content's digest, as 32 hex digits.

    The digest covers every byte of every tensor used, ``dtype``, and the settings beside them that
    shape the KV; no path, no sharding: any changed weight changes it, copies agree. Hashing shares
    the pass over the files with loading, on several threads (blake2b, about 1 GB/s each). Raises
    ConfigError naming tensors that are missing, unexpected or of a wrong shape or type.
    """
    paths = _tensor_files(folder)
    files = {path: safe_open(path, framework="pt") for path in set(paths.values())}
    stored: dict[str, Any] = {name: files[path] for name, path in paths.items()}
    if config.tie_word_embeddings and _same(stored, EMBED, HEAD):
        del stored[HEAD]  # stored twice; a head that differs is not tied, whatever the config says
    weights = _allocate(
        config, dtype, device, tied=config.tie_word_embeddings and HEAD not in stored
    )
    places = _places(config, weights)
    _check(folder, stored, places)

    def read(name: str) -> bytes:
        tensor = stored[name].get_tensor(name)
        places[name].copy_(tensor)
        content = tensor.contiguous().view(torch.uint8).numpy().data
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        return hashlib.blake2b(header + hashlib.blake2b(content).digest()).digest()

    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        digests = readers.map(read, sorted(places))
        return weights, _combine([_computation(config, dtype), *digests])


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[ModelWeights[Tensor], str]:
    """Random weights from the config alone, the same on every device; and their digest.

    Cheap for large models: all tensors repeat one block of normal numbers from different offsets.
    """
    weights = _allocate(config, dtype, device, tied=config.tie_word_embeddings)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(DUMMY_PERIOD, generator=generator).to(device)
    for name, place in _places(config, weights).items():
        if name.endswith("norm.weight"):
            place.fill_(1.0)
            continue
        offset = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
        scaled = (block.roll(offset) * place.shape[-1] ** -0.5).to(dtype)
        flat = place.view(-1)
        for start in range(0, flat.numel(), DUMMY_PERIOD):
            part = flat[start : start + DUMMY_PERIOD]
            part.copy_(scaled[: part.numel()])
    shapes = {name: tuple(place.shape) for name, place in _places(config, weights).items()}
    return weights, _combine([_computation(config, dtype), f"dummy {seed} {shapes}".encode()])


def pack_weights(
    loaded: ModelWeights[Tensor], digest: str, quantization: Quantization | None
) -> tuple[ModelWeights[Weight], str]:
    """The weights in the layout that computes fastest, or in 8 bits; their digest likewise.

    Norms and biases stay as they are. ``loaded`` is used up, layer by layer, so that there is
    never a second copy of more than one. Raises ConfigError for a shape that 8 bits do not allow.
    """
    if quantization is None:
        return _converted(loaded, pack), digest
    try:
        return _converted(loaded, quantize), _combine([digest.encode(), quantization.encode()])
    except ValueError as error:
        raise ConfigError(f"quantization {quantization}: {error}") from error


def _converted(
    loaded: ModelWeights[Tensor], convert: Callable[[Tensor], Weight]
) -> ModelWeights[Weight]:
    tied = loaded.head is loaded.embed
    layers: list[LayerWeights[Weight]] = []
    while loaded.layers:
        layer = loaded.layers.pop(0)
        layers.append(
            LayerWeights(
                attention_norm=layer.attention_norm,
                qkv=convert(layer.qkv),
                qkv_bias=layer.qkv_bias,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                output=convert(layer.output),
                mlp_norm=layer.mlp_norm,
                gate_up=convert(layer.gate_up),
                down=convert(layer.down),
            )
        )
    head = convert(loaded.head)
    return ModelWeights(head if tied else convert(loaded.embed), layers, loaded.norm, head)


def _computation(config: ModelConfig, dtype: torch.dtype) -> bytes:
    """What decides, beside the weights and the rotary embedding, which KV a prompt gives."""
    return f"{dtype} {config.rms_norm_eps!r} {config.windows}".encode()


def _combine(parts: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, tied: bool
) -> ModelWeights[Tensor]:
    def empty(*shape: int) -> Tensor:
        return on_huge_pages(torch.empty(shape, dtype=dtype, device=device))

    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    qkv = queries + 2 * config.num_kv_heads * config.head_dim
    embed = empty(config.vocab_size, hidden)
    layers = [
        LayerWeights(
            attention_norm=empty(hidden),
            qkv=empty(qkv, hidden),
            qkv_bias=empty(qkv) if config.qkv_bias else None,
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            output=empty(hidden, queries),
            mlp_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            down=empty(hidden, inner),
        )
        for _ in range(config.num_layers)
    ]
    head = embed if tied else empty(config.vocab_size, hidden)
    return ModelWeights(embed, layers, empty(hidden), head)


def _places(config: ModelConfig, weights: ModelWeights[Tensor]) -> dict[str, Tensor]:
    """Where each published tensor goes: its name and a view into the fused weights."""
    kv = config.num_kv_heads * config.head_dim
    sizes = [config.num_heads * config.head_dim, kv, kv]
    places = {EMBED: weights.embed, "model.norm.weight": weights.norm}
    if weights.head is not weights.embed:
        places[HEAD] = weights.head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        places |= {
            f"{prefix}input_layernorm.weight": layer.attention_norm,
            f"{prefix}self_attn.o_proj.weight": layer.output,
            f"{prefix}post_attention_layernorm.weight": layer.mlp_norm,
            f"{prefix}mlp.down_proj.weight": layer.down,
        }
        for name, part in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
            places[f"{prefix}mlp.{name}_proj.weight"] = part
        for name, part in zip("qkv", torch.split(layer.qkv, sizes), strict=True):
            places[f"{prefix}self_attn.{name}_proj.weight"] = part
        if layer.qkv_bias is not None:
            for name, part in zip("qkv", torch.split(layer.qkv_bias, sizes), strict=True):
                places[f"{prefix}self_attn.{name}_proj.bias"] = part
        if layer.q_norm is not None and layer.k_norm is not None:
            places[f"{prefix}self_attn.q_norm.weight"] = layer.q_norm
            places[f"{prefix}self_attn.k_norm.weight"] = layer.k_norm
    return places


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, by what the files themselves say."""
    paths = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if not paths:
        raise ConfigError(f"{folder} holds no *.safetensors; other formats are not read")
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        for name in names:
            if name in found:
                raise ConfigError(f"tensor {name} is in both {found[name].name} and {path.name}")
            if not name.endswith(IGNORED_SUFFIX):
                found[name] = path
    return found


def _same(stored: dict[str, Any], first: str, second: str) -> bool:
    """Whether both tensors are stored and equal."""
    if first not in stored or second not in stored:
        return False
    return torch.equal(stored[first].get_tensor(first), stored[second].get_tensor(second))


def _check(folder: Path, stored: dict[str, Any], places: dict[str, Tensor]) -> None:
    """Compare names, shapes and types before any weight is read."""
    wrong = [f"{name} is missing" for name in sorted(places.keys() - stored.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(stored.keys() - places.keys())]
    for name in sorted(places.keys() & stored.keys()):
        part = stored[name].get_slice(name)
        shape, expected = tuple(part.get_shape()), tuple(places[name].shape)
        if shape != expected:
            wrong.append(f"{name} has shape {shape}, config.json says {expected}")
        elif part.get_dtype() not in STORED_DTYPES:
            wrong.append(f"{name} has type {part.get_dtype()}, not one of {STORED_DTYPES}")
    if wrong:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise ConfigError(f"weights in {folder}: {'; '.join(wrong[:MAX_NAMED])}{more}")
