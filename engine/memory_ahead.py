"""Gives KV memory its pages shortly before its blocks are taken for the first time.

The system provides memory when it is first touched, which delays a step or a transfer: 0.1 to 0.6
ms a MiB, and in a virtual machine that its host gives memory only then, 2.5. Only memory just ahead
of what has been in use gets its pages, so that a worker grows with its work and not at once to all
that it may take.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from engine.block_pool import BlockPool
from kernels.cpu.memory import populate

AHEAD = 128 << 20  # bytes that are ready beyond the blocks taken so far
AT_ONCE = 2 << 20  # bytes; whoever maps or unmaps memory waits for as long as they take
NICENESS = 10  # of the thread: steps and transfers go first


class MemoryAhead:
    """Follows ``pool``, whose blocks lie in ``rows``, [num_blocks, row elements] on a CPU."""

    def __init__(self, rows: Tensor, pool: BlockPool) -> None:
        self._rows = rows
        row_bytes = rows[0].nbytes
        self._ahead, self._at_once = AHEAD // row_bytes, max(1, AT_ONCE // row_bytes)  # rows
        self._asked = 0  # rows that are ready, or will be
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="memory-ahead", initializer=os.nice, initargs=(NICENESS,)
        )
        pool.on_begun = self._follow
        self._follow(pool.num_begun)

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._executor.shutdown(cancel_futures=True)

    def _follow(self, num_begun: int) -> None:
        end = min(num_begun + self._ahead, len(self._rows))
        if end - self._asked < self._at_once and end < len(self._rows):
            return
        for start in range(self._asked, end, self._at_once):
            self._executor.submit(populate, self._rows[start : min(start + self._at_once, end)])
        self._asked = max(self._asked, end)
