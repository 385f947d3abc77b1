"""Rotary embedding: inverse frequencies, the table of cosines and sines, and their fingerprint.

Formulas: default, Su et al. 2021 (RoFormer), equation 15; linear, Chen et al. 2023 (position
interpolation), equation 4; llama3, ``apply_scaling`` in Meta's reference code for Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import assert_never

import torch
from torch import Tensor

from engine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position, [head_dim / 2], float32, fastest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.type:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case _:
            assert_never(rope.type)


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def rope_table(rope: RopeConfig, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [0, length): two tensors [length, head_dim / 2], float32."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()


def canonical_text(rope: RopeConfig) -> str:
    """All parameters, in one form on every worker: for the KV fingerprint."""
    return " ".join(f"{name}={value!r}" for name, value in asdict(rope).items())
