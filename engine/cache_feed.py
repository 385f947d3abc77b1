"""What one router is told of the blocks that a worker holds: a snapshot, then changes.

A block goes by the first ``KEY_BYTES`` of its hash. Messages are numbered; number 0 begins a
snapshot, so whoever misses one asks for another and is right again. Memory is bounded by what the
worker can hold: a block that comes and goes between two messages is one change, and where more
has changed a snapshot is shorter.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from engine.block_pool import BlockListener
from protocol.hashing import KEY_BYTES
from protocol.messages import CacheChanges

MAX_CHANGES = 1 << 16  # of a message: 512 KiB


class BlockSource(Protocol):
    """A block pool, or one together with the tiers below it."""

    listeners: list[BlockListener]

    @property
    def num_blocks(self) -> int:
        """Blocks that it can hold."""
        ...

    def findable(self) -> Iterable[bytes]:
        """The names of those that it holds."""
        ...


class CacheFeed:
    """A listener of ``source`` for one router."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._findable: dict[bytes, bool] = {}  # what has changed since the router was told, by key
        self._number = 0  # of the next message
        source.listeners.append(self)

    def stored(self, block_hash: bytes, _: int) -> None:
        """See ``engine.block_pool.BlockListener``."""
        self._change(block_hash, findable=True)

    def evicted(self, block_hash: bytes) -> None:
        """See ``engine.block_pool.BlockListener``."""
        self._change(block_hash, findable=False)

    def restart(self) -> None:
        """The router knows nothing: go on with a snapshot."""
        self._number = 0
        self._findable = {name[:KEY_BYTES]: True for name in self._source.findable()}

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
        if len(self._findable) > 2 * self._source.num_blocks:
            self.restart()
