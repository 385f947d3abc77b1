"""Copies blocks between a worker's arena and a tier, with their digests. Called on one thread.

What a tier gives back is written to its blocks first and checked there: the digest is of what the
next step would read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.tiers.tier import Tier
from kernels.block_copy import gather_blocks, scatter_blocks

WINDOW_BYTES = 8 << 20  # of blocks that are copied at once


class BlockCopier:
    """``rows`` is the arena as [num_blocks, row_elements]; on a GPU it copies in its own stream.

    Whoever calls holds references to the blocks: nobody else writes to them meanwhile.
    """

    def __init__(self, rows: Tensor, tier: Tier) -> None:
        self._rows = rows
        self._tier = tier
        row_bytes = rows.shape[1] * rows.element_size()
        self.window = max(1, min(WINDOW_BYTES // row_bytes, len(rows) // 8))  # blocks
        self._window = torch.empty_like(rows[: self.window])  # on the arena's device
        self._stream: torch.cuda.Stream | None = None
        host = self._window
        if rows.is_cuda:
            self._stream = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
            host = torch.empty_like(self._window, device="cpu", pin_memory=True)
        self._host = host  # the window as the tier sees it: the same memory, on a CPU
        self._host_rows = host.view(torch.uint8).numpy()  # [window, row_bytes]

    def store(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Give the tier at most ``window`` blocks."""
        count = len(blocks)
        with torch.cuda.stream(self._stream):
            digests = gather_blocks(self._rows, blocks, self._window[:count])
            if self._host is not self._window:
                self._host[:count].copy_(self._window[:count])
        for block_hash, digest, row in zip(hashes, digests, self._host_rows[:count], strict=True):
            self._tier.store(block_hash, digest, row)

    def load(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Fill blocks from the tier; how many of them, from the first on, are as they were stored.

        The first that is not ends it: those after it continue it, and are of no use without it.
        """
        for first in range(0, len(blocks), self.window):
            part = slice(first, first + self.window)
            good = self._load_window(hashes[part], blocks[part])
            if good < len(blocks[part]):
                return first + good
        return len(blocks)

    def _load_window(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> int:
        expected: list[int] = []
        for block_hash, row in zip(hashes, self._host_rows, strict=False):
            digest = self._tier.load(block_hash, row)
            if digest is None:
                break
            expected.append(digest)
        count = len(expected)
        with torch.cuda.stream(self._stream):
            if self._host is not self._window:
                self._window[:count].copy_(self._host[:count])
            digests = scatter_blocks(self._window[:count], blocks[:count], self._rows)
        for index, (was, found) in enumerate(zip(expected, digests, strict=True)):
            if was != found:
                self._tier.drop(hashes[index])
                return index
        return count
