"""Paged KV caches for tests, and attention in float64 that knows nothing of pages.

Every element of an arena that no row owns is NaN: blocks of nobody, other layers, and the tail of
a row's last block. Block tables are permuted, and longer than the row: the ids beyond its end lie
outside the arena.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata

LAYERS, LAYER = 3, 1
STALE = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    group: int = 2  # query heads per KV head
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass
class Paged:
    shape: Shape
    kv: Tensor  # the layer's view, [blocks, kv heads, 2, block_size, head_dim]
    tables: list[list[int]]  # of each row, stale ids at the end
    rows: list[Tensor]  # what each row holds, [2, tokens, kv heads, head_dim]

    @property
    def contexts(self) -> list[int]:
        return [row.shape[1] for row in self.rows]

    def metadata(self, query_lens: list[int]) -> AttentionMetadata:
        return AttentionMetadata.build(self.tables, query_lens, self.contexts, "cpu")


def paged(shape: Shape, contexts: list[int], *, seed: int = 0, shared_blocks: int = 0) -> Paged:
    """Rows of random keys and values; the first ``shared_blocks`` blocks are common to all."""
    random = torch.Generator().manual_seed(seed)
    size = shape.block_size
    counts = [-(-context // size) for context in contexts]
    ids = torch.randperm(sum(counts) + 3, generator=random).tolist()
    arena = torch.full(
        (len(ids), shape.kv_heads, LAYERS, 2, size, shape.head_dim), torch.nan, dtype=shape.dtype
    )
    kv = arena[:, :, LAYER]
    tables: list[list[int]] = []
    rows: list[Tensor] = []
    for context, count in zip(contexts, counts, strict=True):
        row = torch.randn((2, context, shape.kv_heads, shape.head_dim), generator=random)
        row = row.to(shape.dtype)
        table = [ids.pop() for _ in range(count)]
        if rows and shared_blocks:
            assert count >= shared_blocks
            table[:shared_blocks] = tables[0][:shared_blocks]
            row[:, : shared_blocks * size] = rows[0][:, : shared_blocks * size]
        for token in range(context):
            kv[table[token // size], :, :, token % size] = row[:, token].transpose(0, 1)
        tables.append(table)
        rows.append(row)
    return Paged(shape, kv, [[*table, STALE, STALE] for table in tables], rows)


def queries(shape: Shape, count: int, *, seed: int = 1) -> Tensor:
    """[count, heads, head_dim], not contiguous: a slice of what a fused projection gives."""
    random = torch.Generator().manual_seed(seed)
    heads = shape.group * shape.kv_heads
    fused = torch.randn((count, heads + 2, shape.head_dim), generator=random).to(shape.dtype)
    return fused[:, 1 : heads + 1]


def dense_attention(q: Tensor, row: Tensor, scale: float, window: int) -> Tensor:
    """Of the last ``len(q)`` tokens of one row, in float64: [queries, heads, head_dim]."""
    k, v = row.double()  # [tokens, kv heads, head_dim] each
    count, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for index in range(count):
        position = len(k) - count + index
        first = max(position - window + 1, 0) if window else 0
        for head in range(heads):
            keys, values = (x[first : position + 1, head // group] for x in (k, v))
            weights = torch.softmax(keys @ q[index, head].double() * scale, dim=0)
            out[index, head] = weights @ values
    return out
