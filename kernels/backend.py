"""Chooses where an operation runs: Triton for CUDA tensors, its torch twin for all others.

The Triton half of an operation lives in ``kernels.gpu`` and is imported by the first call that
needs it: a worker on a CPU never loads Triton.
"""

from __future__ import annotations

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` runs as a Triton kernel."""
    return tensor.is_cuda
