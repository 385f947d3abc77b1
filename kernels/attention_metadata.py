"""What attention needs to know about a step's rows: built once per step, used by every layer.

Holds no key, value or query. What the torch twins derive from it (block ids, masks) is computed
at most once per step and kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kernels.decode_items import DecodeItems, cut_rows

QUERY_TILE = 256  # queries that share one mask in the torch twin


@dataclass(frozen=True, slots=True)
class QueryTile:
    """A run of one row's queries, the keys any of them sees, and which of those each sees."""

    row: int
    start: int  # first query, counted from the row's first
    end: int
    first_block: int  # index into the row's block table
    first_key: int  # counted from the first token of first_block
    end_key: int
    visible: Tensor  # bool [end - start, end_key - first_key]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Row i's queries are the last ``query_lens[i]`` of its ``contexts[i]`` tokens.

    Table entries past a row's length are arbitrary and never dereferenced.
    """

    block_tables: Tensor  # int32 [rows, max_blocks]
    query_starts: Tensor  # int32 [rows + 1]: row i's queries are [starts[i], starts[i + 1])
    context_lens: Tensor  # int32 [rows]: tokens of the row, the new ones included
    query_lens: tuple[int, ...]  # the same on the host
    contexts: tuple[int, ...]
    balance_over: int = 0  # how decode's keys are cut; see kernels.decode_items
    _tables: list[Tensor] = field(default_factory=list, repr=False)
    _tiles: dict[tuple[int, int], list[QueryTile]] = field(default_factory=dict, repr=False)
    _decode_items: dict[int, DecodeItems] = field(default_factory=dict, repr=False)
    _prefill_tiles: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int] | NDArray[np.int32]],
        query_lens: Sequence[int],
        contexts: Sequence[int],
        device: torch.device | str,
        *,
        balance_over: int = 0,
    ) -> AttentionMetadata:
        """Of any number of rows. Raises ValueError when a row has more queries than tokens."""
        for queries, context in zip(query_lens, contexts, strict=True):
            if not 0 <= queries <= context:
                raise ValueError(f"a row of {context} tokens cannot have {queries} queries")
        width = max(map(len, block_tables), default=0)
        padded = np.zeros((len(block_tables), width), np.int32)
        for target, table in zip(padded, block_tables, strict=True):
            target[: len(table)] = table
        starts = [0, *accumulate(query_lens)]
        return cls(
            block_tables=_int32(padded, device),
            query_starts=_int32(starts, device),
            context_lens=_int32(list(contexts), device),
            query_lens=tuple(query_lens),
            contexts=tuple(contexts),
            balance_over=balance_over,
        )

    def row_blocks(self, row: int) -> Tensor:
        """The row's block table, int64 [max_blocks], for torch's indexing."""
        if not self._tables:
            self._tables.extend(self.block_tables.long().unbind())
        return self._tables[row]

    def query_tiles(self, block_size: int, window: int) -> list[QueryTile]:
        """All queries of the step in tiles. ``window`` 0: a query sees all keys up to its own."""
        key = (block_size, window)
        if key not in self._tiles:
            self._tiles[key] = [
                self._tile(row, start, block_size, window)
                for row, queries in enumerate(self.query_lens)
                for start in range(0, queries, QUERY_TILE)
            ]
        return self._tiles[key]

    def decode_items(self, window: int) -> DecodeItems:
        """The work of one query per row, without the keys that ``window`` hides."""
        if window not in self._decode_items:
            cut = cut_rows(np.array(self.contexts, np.int64), window, self.balance_over)
            device = self.block_tables.device
            self._decode_items[window] = DecodeItems(
                items=_int32(cut.items, device),
                count=_int32([len(cut.items)], device),
                row_starts=_int32(cut.row_starts, device),
                num_places=int(cut.row_starts[-1]),
            )
        return self._decode_items[window]

    def prefill_tiles(self, tokens: int) -> Tensor:
        """Every tile of ``tokens`` queries, int32 [tiles, 2]: row, first query of the row.

        Tiles that see many keys come first, so that none of them is left for the end.
        """
        if tokens not in self._prefill_tiles:
            tiles = [
                (row, start)
                for row, queries in enumerate(self.query_lens)
                for start in range(0, queries, tokens)
            ]
            tiles.sort(key=lambda tile: self._num_before(tile[0]) + tile[1], reverse=True)
            self._prefill_tiles[tokens] = _int32(tiles, self.block_tables.device).view(-1, 2)
        return self._prefill_tiles[tokens]

    def _num_before(self, row: int) -> int:
        """Tokens ahead of the row's first query."""
        return self.contexts[row] - self.query_lens[row]

    def _tile(self, row: int, start: int, block_size: int, window: int) -> QueryTile:
        end = min(start + QUERY_TILE, self.query_lens[row])
        before = self._num_before(row)
        first_key = max(before + start + 1 - window, 0) if window else 0
        first_block = first_key // block_size
        device = self.block_tables.device
        positions = torch.arange(before + start, before + end, device=device).unsqueeze(1)
        keys = torch.arange(first_key, before + end, device=device)
        visible = keys <= positions
        if window:
            visible &= keys > positions - window
        return QueryTile(
            row=row,
            start=start,
            end=end,
            first_block=first_block,
            first_key=first_key - first_block * block_size,
            end_key=before + end - first_block * block_size,
            visible=visible,
        )


def _int32(values: ArrayLike, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int32)).to(device)
