"""A simulated tier below decode's pool: it keeps some blocks, and gives some of them back late."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from decode import admission_events as adm
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from tests.fake_model import Memory
from tests.handoff_simulation.network import Network


class SimulatedTier:
    """At most ``num_blocks`` blocks of ``pool``, any of which may be lost at any time.

    ``in_use()`` are the blocks of sequences that decode runs: nobody else writes there.
    """

    def __init__(
        self,
        num_blocks: int,
        pool: BlockPool,
        memory: Memory,
        network: Network,
        tell: Callable[[adm.Loaded], None],
        in_use: Callable[[], list[list[int]]],
    ) -> None:
        self._num_blocks = num_blocks
        self._pool = pool
        self._memory = memory
        self._random = network.random
        self._tell = tell
        self._in_use = in_use
        self._rows: dict[bytes, NDArray[np.int64]] = {}
        self._loads: list[tuple[int, list[bytes], list[int]]] = []
        self.num_loaded = 0
        self.num_missed = 0
        pool.listeners.append(self)

    def stored(self, block_hash: bytes, block: int) -> None:
        """Keep a copy at once, and lose another block if there are too many."""
        if len(self._rows) >= self._num_blocks:
            self._lose()
        if self._num_blocks:
            self._rows[block_hash] = self._memory.rows[block].copy()

    def evicted(self, block_hash: bytes) -> None:
        """It is here still."""

    def _lose(self) -> None:
        if self._rows:
            del self._rows[self._random.choice([*self._rows])]

    @property
    def quiet(self) -> bool:
        """Whether nothing is being loaded."""
        return not self._loads

    def owned_blocks(self) -> list[list[int]]:
        """What is being loaded has a reference here."""
        return [blocks for _, _, blocks in self._loads]

    def loadable(self, sequence: Sequence) -> int:
        """Blocks that go on with the sequence's computed ones."""
        count = 0
        for block_hash in sequence.block_hashes[sequence.num_computed // self._pool.block_size :]:
            if block_hash not in self._rows:
                break
            count += 1
        return count

    def load(self, action: adm.LoadBlocks) -> None:
        """Begin to fill blocks."""
        first = action.sequence.num_computed // self._pool.block_size
        part = slice(first, first + action.count)
        blocks = action.sequence.block_table[part]
        self._pool.hold(blocks)
        self._loads.append((action.grant_id, action.sequence.block_hashes[part], blocks))

    def events(self) -> list[Callable[[], None]]:
        """A load ends."""
        return [partial(self._end, load) for load in self._loads]

    def faults(self) -> list[Callable[[], None]]:
        """A block is lost while some are waited for."""
        return [self._lose] if self._loads else []

    def _end(self, load: tuple[int, list[bytes], list[int]]) -> None:
        grant_id, hashes, blocks = load
        self._loads.remove(load)
        assert not {*blocks} & {block for used in self._in_use() for block in used}
        count = 0
        for block_hash, block in zip(hashes, blocks, strict=True):
            row = self._rows.get(block_hash)
            if row is None:
                break
            self._memory.rows[block] = row
            self._pool.name(block, block_hash)
            count += 1
        self._pool.release(blocks)
        self.num_loaded += count
        self.num_missed += len(blocks) - count
        self._tell(adm.Loaded(grant_id, count))
