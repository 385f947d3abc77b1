"""Which block lies in which slot of a bounded store, least recently used first. Pure state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class SlotTable:
    """At most ``num_slots`` blocks, by their hashes.

    Only ``in``, ``len`` and ``names`` from any thread.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0  # blocks that made room for others
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # next to be evicted first
        self._free: list[int] = []
        self._left: list[bytes] = []  # blocks that were evicted or dropped
        self._unused = 0  # the first slot that never held anything; those after it neither

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def names(self) -> list[bytes]:
        """The hashes of all blocks at one moment."""
        return list(self._slots)  # in one step: no other thread comes in between

    def take_left(self) -> list[bytes]:
        """The hashes of blocks that have been evicted or dropped since the last call."""
        left, self._left = self._left, []
        return left

    def find(self, block_hash: bytes) -> int | None:
        """The block's slot, if it has one; it has then been used."""
        slot = self._slots.get(block_hash)
        if slot is not None:
            self._slots.move_to_end(block_hash)
        return slot

    def oldest(self) -> tuple[bytes, int] | None:
        """The block that ``add`` would evict and its slot, or None while there is room."""
        full = len(self._slots) == self.num_slots
        return next(iter(self._slots.items())) if full else None

    def add(self, block_hash: bytes) -> int:
        """Give a block that has no slot one, the oldest block's if none is free."""
        assert block_hash not in self._slots, "a block has one slot"
        if len(self._slots) == self.num_slots:
            evicted, slot = self._slots.popitem(last=False)
            self._left.append(evicted)
            self.num_evicted += 1
        elif self._free:
            slot = self._free.pop()
        else:
            slot = self._unused
            self._unused += 1
        self._slots[block_hash] = slot
        return slot

    def drop(self, block_hash: bytes) -> int | None:
        """Take the block's slot away; the slot, if it had one."""
        slot = self._slots.pop(block_hash, None)
        if slot is not None:
            self._free.append(slot)
            self._left.append(block_hash)
        return slot

    def fill(self, blocks: Iterable[tuple[bytes, int]]) -> None:
        """Put blocks into given slots of an empty table, the oldest first."""
        assert not self._slots, "the table is in use"
        self._slots.update(blocks)
        taken = set(self._slots.values())
        self._unused = max(taken, default=-1) + 1
        self._free = [slot for slot in range(self._unused) if slot not in taken]
