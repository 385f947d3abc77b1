"""Between the projection and attention: QK-norm, rotary embedding and KV write, in one pass.

The rotary embedding (Su et al. 2021) turns heads in Llama's order: element i of a head's first
half and element i of its second half are a pair, turned by angle i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.cpu import library
from kernels.cpu.elementwise import rotate_and_write_native
from kernels.rms_norm import rms_norm_torch


def rotate_and_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """Store token t's rotated keys and its values at ``slots[t]``; return the rotated queries.

    ``qkv`` is [tokens, (heads + 2 * kv heads) * head_dim], contiguous: each token's queries, keys
    and values. ``q_norm`` and ``k_norm``, [head_dim], are the weights of an RMSNorm of every head,
    in the roundings of ``kernels.rms_norm``; both or neither are None. ``cos`` and ``sin`` are
    float32 [tokens, head_dim / 2], contiguous; heads turn in float32, rounded once. ``kv`` is a
    layer's view of the arena, [num_blocks, kv heads, 2, block_size, head_dim], of ``qkv``'s type;
    ``slots`` is int64 [tokens], block * block_size + offset, all different except in blocks that
    nobody reads. The queries are [tokens, heads, head_dim], a new tensor.
    """
    if use_triton(qkv):
        from kernels.gpu.rotate_and_write import rotate_and_write_triton

        return rotate_and_write_triton(qkv, q_norm, k_norm, eps, cos, sin, kv, slots)
    native = library.load()
    if native is not None:
        return rotate_and_write_native(native, qkv, q_norm, k_norm, eps, cos, sin, kv, slots)
    return rotate_and_write_torch(qkv, q_norm, k_norm, eps, cos, sin, kv, slots)


def rotate_and_write_torch(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """``rotate_and_write`` in torch."""
    _, kv_heads, _, block_size, head_dim = kv.shape
    heads = qkv.view(len(qkv), qkv.shape[1] // head_dim, head_dim)
    q, k, v = heads.tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_torch(q, q_norm, eps), rms_norm_torch(k, k_norm, eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    where = (slots // block_size, slots % block_size)
    by_slot = kv.permute(2, 0, 3, 1, 4)  # [2, blocks, block_size, kv heads, head_dim]
    by_slot[0].index_put_(where, _rotated(k, cos, sin))
    by_slot[1].index_put_(where, v)
    return _rotated(q, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
