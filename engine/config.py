"""A model's shape, read from a checkpoint's JSON; refuses by name what the engine cannot compute.

One class serves all families: they differ in a few flags. Reads what publishers write and what
transformers 5 writes (``rope_parameters``, ``dtype``). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from protocol.errors import ConfigError
from protocol.geometry import DTYPE_BYTES, KVDtype

RopeType = Literal["default", "linear", "llama3"]
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name alone says."""

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all layers", "by layer"] = "none"
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads


_FAMILIES = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(window="all layers"),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, window="by layer"),
    "Qwen3ForCausalLM": _Family(qk_norm=True, window="by layer", default_head_dim=128),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of the rotary embedding. Factors that a type does not use keep their default."""

    type: RopeType = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0  # tokens


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the publisher recommends; None where the checkpoint says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]  # per layer: tokens a query sees, itself included; 0: all
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int  # tokens
    dtype: KVDtype  # in which the weights are published
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` and, where there is one, ``generation_config.json``.

        Raises ConfigError naming the architecture or the setting that is not supported.
        """
        generation = folder / "generation_config.json"
        return cls.parse(
            _read_json(folder / "config.json"),
            _read_json(generation) if generation.exists() else {},
        )

    @classmethod
    def parse(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """Build from the two files' content. Raises ConfigError like ``load``."""
        architecture = _architecture(raw)
        family = _FAMILIES[architecture]
        _refuse_unsupported(raw)
        hidden_size, num_heads = (
            _positive(raw, "hidden_size"),
            _positive(raw, "num_attention_heads"),
        )
        num_layers = _positive(raw, "num_hidden_layers")
        num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
        head_dim = _positive(raw, "head_dim", family.default_head_dim or hidden_size // num_heads)
        if num_heads % num_kv_heads:
            heads = f"num_attention_heads {num_heads}, num_key_value_heads {num_kv_heads}"
            raise ConfigError(f"config.json: {heads}: the first must be a multiple of the second")
        if head_dim % 2:
            raise ConfigError(f"config.json: head_dim {head_dim} is odd")
        max_positions = _positive(raw, "max_position_embeddings")
        return cls(
            architecture=architecture,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, max_positions),
            windows=_windows(raw, family, num_layers),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=max_positions,
            dtype=_dtype(raw),
            eos_token_ids=_token_ids(generation.get("eos_token_id", raw.get("eos_token_id"))),
            sampling_defaults=_sampling_defaults(generation),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in _FAMILIES:
            return cast("str", name)
    found = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise ConfigError(f"{found} is not supported; supported: {', '.join(_FAMILIES)}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported; only silu is")
    for name in ("quantization_config", "attention_bias", "mlp_bias"):
        if raw.get(name):
            raise ConfigError(f"config.json: {name} is not supported")


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _dtype(raw: Mapping[str, Any]) -> KVDtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPE_BYTES:
        raise ConfigError(f"config.json: dtype {name!r} is not supported")
    return cast("KVDtype", name)


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in get_args(RopeType):
        known = ", ".join(get_args(RopeType))
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; supported: {known}")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ConfigError("config.json: rope_parameters by layer type are not supported")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"config.json: partial_rotary_factor {partial} is not supported")
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or DEFAULT_THETA)
    try:
        match kind:
            case "linear":
                return RopeConfig("linear", theta, float(scaling["factor"]))
            case "llama3":
                return RopeConfig(
                    "llama3",
                    theta,
                    float(scaling["factor"]),
                    float(scaling["low_freq_factor"]),
                    float(scaling["high_freq_factor"]),
                    int(scaling.get("original_max_position_embeddings") or max_positions),
                )
            case _:
                return RopeConfig("default", theta)
    except KeyError as error:
        raise ConfigError(f"config.json: rope type {kind} without {error}") from error


def _windows(raw: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int, ...]:
    everywhere = (0,) * num_layers
    if family.window == "none":
        return everywhere
    by_layer = family.window == "by layer"
    if by_layer and not raw.get("use_sliding_window", False):
        return everywhere
    # Both families' classes in transformers take an absent window for 4096, null for none.
    window = raw.get("sliding_window", 4096)
    if window is None:
        return everywhere
    window = _positive({"sliding_window": window}, "sliding_window")
    if not by_layer:
        return (window,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28))
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise ConfigError(f"config.json: {len(kinds)} layer_types for {num_layers} layers")
    spans = {"full_attention": 0, "sliding_attention": window}
    if unknown := sorted(set(kinds) - spans.keys()):
        raise ConfigError(f"config.json: layer type {unknown[0]!r} is not supported")
    return tuple(spans[kind] for kind in kinds)


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ConfigError(f"eos_token_id must be one or several integers, not {value!r}")
    return tuple(ids)


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    greedy = generation.get("do_sample") is False
    return SamplingDefaults(
        temperature=0.0 if greedy else generation.get("temperature"),
        top_k=generation.get("top_k"),
        top_p=generation.get("top_p"),
        min_p=generation.get("min_p"),
        repetition_penalty=generation.get("repetition_penalty"),
    )
