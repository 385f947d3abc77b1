"""Batches of blocks that the transport may be reading, by grant id and first grant position.

Each holds references of its own, so a block is never reused while it is read, whatever becomes of
the request.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_pool import BlockPool


class Shipments:
    """All of one prefill worker."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._batches: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def begin(self, grant_id: int, first: int, blocks: Sequence[int]) -> None:
        """Hold the blocks, which lie from grant position ``first`` on, for the transport."""
        self._pool.retain(blocks)
        self._batches[grant_id, first] = [*blocks]

    def end(self, grant_id: int, first: int) -> None:
        """The transport is done with the batch. Raises KeyError for one that is not under way."""
        self._pool.release(self._batches.pop((grant_id, first)))

    def grant_ids(self) -> set[int]:
        """Grants under which something is under way."""
        return {grant_id for grant_id, _ in self._batches}

    def blocks(self) -> list[list[int]]:
        """What is held, for ``BlockPool.check_integrity``."""
        return [*self._batches.values()]
