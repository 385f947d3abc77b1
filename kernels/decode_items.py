"""How decode attention's keys become units of work for a GPU: integers only, no key and no query.

An item is a run of one row's keys; a program attends to it for one KV head. Two ways to cut:

- By the row's own length (the default): parts of 256 tokens, doubled until there are at most 64.
  A row's parts, and with them the order in which its result is summed up, do not depend on the
  other rows.
- Balanced over a number of programs: all rows in parts of one size, so that together they are
  about as many as the programs. Fewer parts to combine when the batch is large, but the last bits
  of a row's result then depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]

PART = 256  # tokens of the smallest part of a row cut by its own length
MAX_PARTS = 64  # of a row cut by its own length
TILE = 64  # tokens; parts start at multiples of it, or at a window's first key
ALONE = -1  # the place of an item whose row has no other


@dataclass(frozen=True, slots=True)
class DecodeItems:
    """On the device. Shapes may exceed what is in use: a captured graph fixes them."""

    items: Tensor  # int32 [>= count, 4]: row, first token, end, place; the longest first
    count: Tensor  # int32 [1]: items in use
    row_starts: Tensor  # int32 [rows + 1]: row i's places are [row_starts[i], row_starts[i + 1])
    num_places: int  # room for partial results; 0 when every row is one item


@dataclass(frozen=True, slots=True)
class Cut:
    """What fills a ``DecodeItems``; a row of no tokens is one empty item."""

    items: Integers  # [count, 4]
    row_starts: Integers  # [rows + 1]


def cut_rows(contexts: Integers, window: int, balance_over: int = 0) -> Cut:
    """Rows of ``contexts`` tokens, of which a ``window`` other than 0 shows only the last ones.

    ``balance_over`` is the number of programs per KV head to keep busy; 0 cuts each row by its
    own length.
    """
    lowest = np.maximum(contexts - window, 0) if window else np.zeros_like(contexts)
    sizes = _part_sizes(contexts - lowest, balance_over)
    first = lowest // sizes
    counts = np.maximum(-(-contexts // sizes) - first, 1)
    rows = np.repeat(np.arange(len(contexts)), counts)
    index = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # in the row
    part = first[rows] + index
    starts = np.maximum(part * sizes[rows], lowest[rows])
    ends = np.minimum((part + 1) * sizes[rows], contexts[rows])
    split = counts > 1
    row_starts = np.concatenate([[0], np.cumsum(np.where(split, counts, 0))])
    places = np.where(split[rows], row_starts[rows] + index, ALONE)
    longest_first = np.argsort(starts - ends, kind="stable")
    return Cut(np.stack([rows, starts, ends, places], axis=1)[longest_first], row_starts)


def most_items(rows: int, max_context: int, window: int, balance_over: int = 0) -> int:
    """The most items that ``cut_rows`` makes of ``rows`` rows of at most ``max_context`` tokens."""
    if balance_over:
        return balance_over + 2 * rows  # a row's first and last part may be short
    if window and window < max_context:
        return rows * (_most_parts(window) + 1)  # a window need not start where a part does
    return rows * _most_parts(max_context)


def _most_parts(tokens: int) -> int:
    return min(max(-(-tokens // PART), 1), MAX_PARTS)


def _part_sizes(tokens: Integers, balance_over: int) -> Integers:
    """The size of each row's parts, of which ``tokens`` are seen."""
    if balance_over:
        tiles = int((-(-tokens // TILE)).sum())
        return np.full_like(tokens, max(-(-tiles // balance_over), 1) * TILE)
    doublings = np.ceil(np.log2(np.maximum(tokens / (PART * MAX_PARTS), 1)))
    return PART << doublings.astype(np.int64)
