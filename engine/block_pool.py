"""The pool of KV blocks on one worker: reference counts, prefix cache, least recently used.

Every reference to a block has one owner: a sequence, a grant or a lease. A block without
references is free; if it is named by a hash it stays findable until it is taken for something
else, oldest first. Imports no torch: the simulator and the property tests run this very class.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Blocks
from typing import Protocol

from engine.sequence import Sequence
from protocol.hashing import hash_block, hash_root


class BlockListener(Protocol):
    """Hears which blocks are findable, at the moment that changes."""

    def stored(self, block_hash: bytes, block: int) -> None:
        """The block can be found by its hash from now on."""
        ...

    def evicted(self, block_hash: bytes) -> None:
        """The block cannot be found any more: it is about to be overwritten."""
        ...


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens. ``salt`` separates models' hashes."""

    def __init__(self, num_blocks: int, block_size: int, salt: bytes = b"") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._salt = salt
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next first
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0  # tokens found
        self.listeners: list[BlockListener] = []
        self.num_begun = 0  # blocks up to the last one that was ever taken
        self.on_begun: Callable[[int], None] = lambda _: None  # hears of every new ``num_begun``

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can give, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, one reference each, or None when there are not enough."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        last = max(blocks, default=-1)
        if last >= self.num_begun:
            self.num_begun = last + 1
            self.on_begun(self.num_begun)
        for block in blocks:
            self._references[block] = 1
            block_hash = self._hash_by_block.pop(block, None)
            if block_hash is not None:
                del self._block_by_hash[block_hash]
                for listener in self.listeners:
                    listener.evicted(block_hash)
        return blocks

    def findable(self) -> Iterable[bytes]:
        """The names of all blocks that have one."""
        return self._block_by_hash.keys()

    def find(self, block_hash: bytes) -> int | None:
        """The block of that name, if there is one."""
        return self._block_by_hash.get(block_hash)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, which may be free: it keeps what it has."""
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)

    def retain(self, blocks: Blocks[int]) -> None:
        """Add a reference to each block; all must have one already."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} retained without a reference"
            self._references[block] += 1

    def release(self, blocks: Blocks[int]) -> None:
        """Drop one reference to each block; the last one frees it.

        A sequence's later blocks are evicted before its earlier ones: a prefix is worth more.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released without a reference"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_by_block:
                    self._free.move_to_end(block, last=False)

    def reserve(self, sequence: Sequence, max_cached_tokens: int, headroom: int = 0) -> bool:
        """Give a sequence without blocks all it needs for its tokens, cached prefix first.

        At most ``max_cached_tokens`` tokens, in whole blocks, come from the prefix cache; they
        count as computed. False, and no change, unless ``headroom`` blocks stay free.
        """
        self.extend_hashes(sequence)
        prefix: list[int] = []
        for block_hash in sequence.block_hashes[: max_cached_tokens // self.block_size]:
            block = self._block_by_hash.get(block_hash)
            if block is None:
                break
            prefix.append(block)
        taken_from_free = sum(self._references[block] == 0 for block in prefix)
        missing = self.blocks_for(sequence.num_tokens) - len(prefix)
        if missing + headroom > len(self._free) - taken_from_free:
            return False
        self.hold(prefix)
        blocks = self.allocate(missing)
        assert blocks is not None
        sequence.block_table = prefix + blocks
        sequence.num_computed = sequence.num_cached = len(prefix) * self.block_size
        self.prefix_queries += max_cached_tokens
        self.prefix_hits += sequence.num_computed
        return True

    def adopt(self, sequence: Sequence) -> None:
        """Put blocks that were named since the sequence got its own in the place of its next ones.

        They count as computed, and as found in the cache unless its KV has existed before.
        """
        first = end = sequence.num_computed // self.block_size
        found: list[int] = []
        while end < sequence.num_cacheable // self.block_size:
            block = self._block_by_hash.get(sequence.block_hashes[end])
            if block is None:
                break
            found.append(block)
            end += 1
        if not found:
            return
        table = sequence.block_table
        self.hold(found)
        self.release(table[first:end])
        sequence.block_table = [*table[:first], *found, *table[end:]]
        num_found = end * self.block_size - sequence.num_computed
        sequence.num_computed += num_found
        self.prefix_hits += num_found
        if not sequence.recomputed:
            sequence.num_cached += num_found

    def extend_hashes(self, sequence: Sequence) -> None:
        """Name every block that the sequence's known tokens fill."""
        hashes = sequence.block_hashes
        for start in range(
            len(hashes) * self.block_size,
            sequence.num_tokens - self.block_size + 1,
            self.block_size,
        ):
            tokens = sequence.token_ids[start : start + self.block_size]
            previous = hashes[-1] if hashes else hash_root(sequence.cache_salt)
            hashes.append(hash_block(previous, tokens, self._salt))

    def publish(self, sequence: Sequence, computed_before: int) -> None:
        """Make blocks findable that became full since ``computed_before`` tokens were computed.

        A hash that another block holds already keeps that block.
        """
        first, last = computed_before // self.block_size, sequence.num_computed // self.block_size
        if first == last:
            return
        self.extend_hashes(sequence)
        for index in range(first, last):
            self.name(sequence.block_table[index], sequence.block_hashes[index])

    def name(self, block: int, block_hash: bytes) -> None:
        """Make a full block findable, unless it has a name or another block has that one."""
        if block_hash not in self._block_by_hash and block not in self._hash_by_block:
            self._block_by_hash[block_hash] = block
            self._hash_by_block[block] = block_hash
            for listener in self.listeners:
                listener.stored(block_hash, block)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold ``num_tokens``; False, and no change, if it cannot."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > 0:
            blocks = self.allocate(missing)
            if blocks is None:
                return False
            sequence.block_table += blocks
        return True

    def release_sequence(self, sequence: Sequence) -> None:
        """Drop the sequence's references and forget its progress."""
        self.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def check_integrity(self, owners: Iterable[Blocks[int]]) -> None:
        """Assert that the references are exactly those of ``owners``, each a list of blocks."""
        expected = Counter(block for blocks in owners for block in blocks)
        for block, references in enumerate(self._references):
            assert references == expected[block], (
                f"block {block}: {references} references, {expected[block]} owners"
            )
            assert (block in self._free) == (references == 0), f"block {block}: free list is wrong"
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block
