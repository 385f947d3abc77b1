"""Random paged KV caches, and queries for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata

LAYERS = 2  # of the arena; the attention under test is the second's


@dataclass(frozen=True, slots=True)
class Heads:
    num: int
    num_kv: int
    dim: int

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)


@dataclass(frozen=True, slots=True)
class Cache:
    kv: Tensor  # [blocks, kv heads, 2, block_size, head_dim], one layer of an arena
    tables: list[list[int]]
    contexts: list[int]

    def metadata(self, query_lens: Sequence[int], *, balance_over: int = 0) -> AttentionMetadata:
        return AttentionMetadata.build(
            self.tables, query_lens, self.contexts, self.kv.device, balance_over=balance_over
        )


def random_cache(
    contexts: Sequence[int],
    heads: Heads,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_order: bool = False,
) -> Cache:
    """Rows of ``contexts`` tokens, their blocks anywhere in the arena unless ``in_order``."""
    counts = [-(-context // block_size) for context in contexts]
    shape = (sum(counts), heads.num_kv, LAYERS, 2, block_size, heads.dim)
    arena = torch.randn(shape, dtype=dtype, device=device)
    seed = torch.Generator().manual_seed(0)
    ids = torch.arange(len(arena)) if in_order else torch.randperm(len(arena), generator=seed)
    tables = [table.tolist() for table in torch.split(ids, counts)]
    return Cache(arena[:, :, 1], tables, list(contexts))


def random_queries(tokens: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[tokens, heads, head_dim]."""
    return torch.randn((tokens, heads.num, heads.dim), dtype=dtype, device=device)
