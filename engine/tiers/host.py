"""Blocks in host memory, for workers whose KV pool is a GPU's."""

from __future__ import annotations

from array import array

import torch

from engine.memory import GIB, host_budget, size_text
from engine.tiers.slots import SlotTable
from engine.tiers.tier import Row, Tier, TierCounters
from protocol.errors import ConfigError


class HostTier:
    """At most ``max_bytes`` of blocks; what makes room goes to the tier ``below``, if there is one.

    Raises ConfigError when the host does not give that much memory.
    """

    name = "host"
    writable = True

    def __init__(self, max_bytes: int, row_bytes: int, below: Tier | None = None) -> None:
        if max_bytes < row_bytes:
            raise ConfigError(f"{max_bytes} bytes hold no KV block: one has {row_bytes}")
        free = host_budget(max_bytes / GIB)
        if free < max_bytes:
            wanted, have = size_text(max_bytes), size_text(free)
            raise ConfigError(f"{wanted} of KV do not fit the host's memory: {have} may be used")
        self.slots = SlotTable(max_bytes // row_bytes)
        self.counters = TierCounters()
        self._below = below
        self._rows = torch.empty((self.slots.num_slots, row_bytes), dtype=torch.uint8).numpy()
        self._digests = array("Q", bytes(8 * self.slots.num_slots))  # by slot

    def __contains__(self, block_hash: bytes) -> bool:
        below = self._below
        return block_hash in self.slots or (below is not None and block_hash in below)

    def store(self, block_hash: bytes, digest: int, row: Row) -> bool:
        """Copy a block; the one that makes room for it moves below."""
        if block_hash in self.slots:
            return True
        oldest = self.slots.oldest()
        if oldest is not None and self._below is not None:
            evicted, slot = oldest
            self._below.store(evicted, self._digests[slot], self._rows[slot])
        slot = self.slots.add(block_hash)
        self._rows[slot] = row
        self._digests[slot] = digest
        self.counters.stored += 1
        return True

    def load(self, block_hash: bytes, row: Row) -> int | None:
        """Copy a block into ``row``, from here or from below."""
        slot = self.slots.find(block_hash)
        if slot is None:
            return None if self._below is None else self._below.load(block_hash, row)
        row[:] = self._rows[slot]
        self.counters.loaded += 1
        return self._digests[slot]

    def drop(self, block_hash: bytes) -> None:
        """Forget a damaged block."""
        if self.slots.drop(block_hash) is not None:
            self.counters.refused["damaged"] += 1
        if self._below is not None:
            self._below.drop(block_hash)

    def close(self) -> None:
        """Give the memory back."""
        del self._rows
