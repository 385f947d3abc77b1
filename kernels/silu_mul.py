"""The gate of a SwiGLU feed-forward layer (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.elementwise import silu_mul_native


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [tokens, inter]; a new tensor.

    ``gate_up`` is [tokens, 2 * inter], contiguous: each token's gate, then its up. silu in
    float32, rounded to the input's type before the product, as Llama does.
    """
    if use_triton(gate_up):
        from kernels.gpu.silu_mul import silu_mul_triton

        return silu_mul_triton(gate_up)
    native = library.load()
    if native is not None:
        return silu_mul_native(native, gate_up)
    return silu_mul_torch(gate_up)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """``silu_mul`` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
