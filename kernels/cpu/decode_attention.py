"""Decode attention in C++, straight from the arena."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.cpu.library import DTYPES


def decode_attention_native(
    library: ctypes.CDLL,
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int,
) -> Tensor:
    """``kernels.decode_attention.decode_attention``; heads of at most ``MAX_HEAD_DIM``."""
    rows, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    library.decode_attention(
        DTYPES[q.dtype],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        kv.data_ptr(),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.shape[3],
        head_dim,
        meta.block_tables.data_ptr(),
        meta.block_tables.shape[1],
        meta.context_lens.data_ptr(),
        rows,
        num_heads,
        kv.shape[1],
        scale,
        window,
        out.data_ptr(),
    )
    return out
