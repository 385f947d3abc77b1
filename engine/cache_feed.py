"""What one router is told of the blocks that a worker's pool can find: a snapshot, then changes.

A block goes by the first ``KEY_BYTES`` of its hash. Messages are numbered; number 0 begins a
snapshot, so whoever misses one asks for another and is right again. Memory is bounded by the pool:
a block that comes and goes between two messages is one change, and where more has changed than
the pool holds a snapshot is shorter.
"""

from __future__ import annotations

from itertools import islice

from engine.block_pool import BlockPool
from protocol.hashing import KEY_BYTES
from protocol.messages import CacheChanges

MAX_CHANGES = 1 << 16  # of a message: 512 KiB


class CacheFeed:
    """A listener of ``pool`` for one router."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._findable: dict[bytes, bool] = {}  # what has changed since the router was told, by key
        self._number = 0  # of the next message
        pool.listeners.append(self)

    def stored(self, block_hash: bytes, _: int) -> None:
        """See ``engine.block_pool.BlockListener``."""
        self._change(block_hash, findable=True)

    def evicted(self, block_hash: bytes) -> None:
        """See ``engine.block_pool.BlockListener``."""
        self._change(block_hash, findable=False)

    def restart(self) -> None:
        """The router knows nothing: go on with a snapshot."""
        self._number = 0
        self._findable = {name[:KEY_BYTES]: True for name in self._pool.findable()}

    def take(self) -> CacheChanges | None:
        """The next message, or None when the router knows everything."""
        if not self._findable and self._number > 0:
            return None
        changes = dict(islice(self._findable.items(), MAX_CHANGES))
        for key in changes:
            del self._findable[key]
        message = CacheChanges(
            number=self._number,
            stored=b"".join(key for key, findable in changes.items() if findable),
            evicted=b"".join(key for key, findable in changes.items() if not findable),
        )
        self._number += 1
        return message

    def _change(self, block_hash: bytes, *, findable: bool) -> None:
        self._findable[block_hash[:KEY_BYTES]] = findable
        if len(self._findable) > 2 * self._pool.num_blocks:
            self.restart()
