"""How blocks become messages: pure arithmetic, shared by both ends.

A message says itself what it is. Its tag is ``grant_id (32 bits) | first position (20) | count
(12)`` and its bytes are the rows of those positions in order, so no control message goes along.

Blocks that lie side by side at **both** ends travel straight between the arenas. Others do so one
by one when their rows are large; small rows would make thousands of messages that way, so they are
packed into a staging buffer's worth. Where every block is packed, or the peer copies rows from
where they lie, only the length of a message matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.config import TransferConfig

MAX_GRANT_ID = 2**32 - 1
MAX_POSITIONS = 2**20  # of a grant
MAX_COUNT = 2**12 - 1  # blocks of a message


@dataclass(frozen=True, slots=True)
class Tag:
    """Positions ``first .. first + count - 1`` of a grant."""

    grant_id: int
    first: int
    count: int

    def pack(self) -> int:
        """The 64 bits that UCX carries."""
        return self.grant_id << 32 | self.first << 12 | self.count

    @classmethod
    def unpack(cls, bits: int) -> Tag:
        """Undo ``pack``; every 64-bit number has a meaning, though perhaps no grant."""
        return cls(bits >> 32, bits >> 12 & MAX_POSITIONS - 1, bits & MAX_COUNT)


@dataclass(frozen=True, slots=True)
class Piece:
    """One message: positions from ``first`` on, and the blocks they lie in here."""

    first: int
    source: Sequence[int]


def cut(
    first: int,
    source: Sequence[int],
    destination: Sequence[int],
    row_bytes: int,
    config: TransferConfig,
) -> list[Piece]:
    """Split a batch into messages that cover each of its positions once, in order."""
    most_straight = _rows_of(config.message_bytes, row_bytes)
    most_packed = _rows_of(config.staging_bytes, row_bytes) if row_bytes < config.stage_below else 0
    pieces, start, straight = [], 0, True
    for i in range(1, len(source) + 1):
        if i < len(source):
            straight = (
                straight
                and source[i] == source[i - 1] + 1
                and destination[i] == destination[i - 1] + 1
            )
            if i - start < (most_straight if straight else most_packed):
                continue
        pieces.append(Piece(first + start, source[start:i]))
        start, straight = i, True
    return pieces


def cut_evenly(
    first: int, source: Sequence[int], row_bytes: int, message_bytes: int
) -> list[Piece]:
    """``cut`` into messages that take blocks wherever they lie."""
    most = _rows_of(message_bytes, row_bytes)
    return [Piece(first + i, source[i : i + most]) for i in range(0, len(source), most)]


def _rows_of(num_bytes: int, row_bytes: int) -> int:
    return min(max(num_bytes // row_bytes, 1), MAX_COUNT)


def is_run(blocks: Sequence[int]) -> bool:
    """Whether the blocks lie side by side, in order."""
    return all(b == a + 1 for a, b in itertools.pairwise(blocks))
