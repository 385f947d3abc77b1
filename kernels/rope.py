"""Rotary position embedding (Su et al. 2021), in Llama's order: the two halves of a head rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate every head; contiguous new tensors, the inputs stay as they are.

    ``q`` is [tokens, num_heads, head_dim], ``k`` [tokens, num_kv_heads, head_dim], their last
    dimension contiguous; ``cos`` and ``sin`` are float32 [tokens, head_dim / 2], contiguous.
    Element i of a head's first half and element i of its second half turn by angle i. Computed in
    float32, rounded once.
    """
    if use_triton(q):
        from kernels.gpu.rope import apply_rope_triton

        return apply_rope_triton(q, k, cos, sin)
    return apply_rope_torch(q, k, cos, sin)


def apply_rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``apply_rope`` in torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
