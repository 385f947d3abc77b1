"""The blocks that a worker holds, in its pool or below: what routers are told of.

A block that only moves between the pool and its tiers stays held. All of this is the event loop's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.block_pool import BlockListener, BlockPool
from engine.tiers.tier import Tier


class HeldBlocks:
    """What ``pool`` and ``tiers``, the fastest first, hold together; its listeners hear of it."""

    def __init__(self, pool: BlockPool, tiers: Sequence[Tier]) -> None:
        self._pool = pool
        self._tiers = tiers
        self.listeners: list[BlockListener] = []
        pool.listeners.append(self)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be held at once."""
        return self._pool.num_blocks + sum(tier.slots.num_slots for tier in self._tiers)

    def findable(self) -> Iterable[bytes]:
        """The names of all blocks that are held; one in two places comes twice."""
        yield from self._pool.findable()
        for tier in self._tiers:
            yield from tier.slots.names()

    def stored(self, block_hash: bytes, block: int) -> None:
        """See ``engine.block_pool.BlockListener``."""
        for listener in self.listeners:
            listener.stored(block_hash, block)

    def evicted(self, block_hash: bytes) -> None:
        """See ``engine.block_pool.BlockListener``."""
        if block_hash not in self._tiers[0]:  # which knows those below it
            for listener in self.listeners:
                listener.evicted(block_hash)

    def left(self, block_hashes: Iterable[bytes]) -> None:
        """These have left a tier; they may be in another one, or in the pool."""
        for block_hash in block_hashes:
            if self._pool.find(block_hash) is None:
                self.evicted(block_hash)
