"""Decode metadata at fixed addresses and of fixed shapes, as a captured graph needs it.

Filling a bucket writes one staging array on the host, page-locked when the device is a GPU, and
copies it to the device in one piece; a graph captured with any earlier filling then computes with
the new values. Rows beyond the batch have no tokens: their results are zeros, and their block
tables are never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from kernels.attention_metadata import AttentionMetadata
from kernels.decode_items import DecodeItems, cut_rows, most_items


class DecodeBucket:
    """For up to ``rows`` rows of at most ``max_context`` tokens, in blocks of ``block_size``.

    ``windows`` are those of the model's layers, 0 for none; ``balance_over`` is as in
    ``kernels.decode_items``.
    """

    def __init__(
        self,
        rows: int,
        max_context: int,
        block_size: int,
        windows: Iterable[int],
        device: torch.device | str,
        *,
        balance_over: int = 0,
    ) -> None:
        self._max_context = max_context
        self._balance_over = balance_over
        width = -(-max_context // block_size)
        sizes = [rows * width, rows + 1, rows]
        capacities = {
            window: most_items(rows, max_context, window, balance_over) for window in set(windows)
        }
        for capacity in capacities.values():
            sizes += [4 * capacity, 1, rows + 1]
        on_gpu = torch.device(device).type == "cuda"
        self._staging = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        self._device = self._staging.to(device)  # on a CPU the staging array itself

        host = iter([part.numpy() for part in torch.split(self._staging, sizes)])
        self._host_tables = next(host).reshape(rows, width)
        self._host_query_starts, self._host_contexts = next(host), next(host)
        self._host_work = {
            window: (next(host).reshape(-1, 4), next(host), next(host)) for window in capacities
        }
        parts = iter(torch.split(self._device, sizes))
        self._tables = next(parts).view(rows, width)
        self._query_starts, self._contexts = next(parts), next(parts)
        self._decode_items = {
            window: DecodeItems(
                items=next(parts).view(-1, 4),
                count=next(parts),
                row_starts=next(parts),
                num_places=capacity if capacity > rows else 0,
            )
            for window, capacity in capacities.items()
        }

    def fill(self, block_tables: Sequence[ArrayLike], contexts: Sequence[int]) -> AttentionMetadata:
        """Of one query for each row of ``contexts``, then of rows without tokens.

        The copy to a GPU is asynchronous: the step that uses it must have ended before the next
        call. Raises ValueError when a batch does not fit the bucket.
        """
        rows, width = self._host_tables.shape
        if len(contexts) > rows:
            raise ValueError(f"{len(contexts)} rows do not fit a bucket of {rows}")
        if max(contexts, default=0) > self._max_context:
            raise ValueError(
                f"a row of {max(contexts)} tokens does not fit a bucket of {self._max_context}"
            )
        padded = np.zeros(rows, np.int64)
        padded[: len(contexts)] = contexts
        queries = np.minimum(padded, 1)
        for target, table in zip(self._host_tables, block_tables, strict=False):
            blocks = np.asarray(table)[:width]
            target[: len(blocks)] = blocks
        self._host_query_starts[1:] = np.cumsum(queries)
        self._host_contexts[:] = padded
        for window, (items, count, row_starts) in self._host_work.items():
            cut = cut_rows(padded, window, self._balance_over)
            items[: len(cut.items)] = cut.items
            count[0] = len(cut.items)
            row_starts[:] = cut.row_starts
        if self._device is not self._staging:
            self._device.copy_(self._staging, non_blocking=True)
        return AttentionMetadata(
            block_tables=self._tables,
            query_starts=self._query_starts,
            context_lens=self._contexts,
            query_lens=tuple(queries.tolist()),
            contexts=tuple(padded.tolist()),
            balance_over=self._balance_over,
            _decode_items=dict(self._decode_items),  # of another window: its own
        )
