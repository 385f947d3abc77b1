"""What a tier is: a bounded store of KV blocks, found by their hashes. Imports no torch.

A block's hash names the tokens, the cache salt and the KV fingerprint, so that another model's
block is never found. A tier returns what it has with the digest that the block had when it was
stored; the reader compares that with the digest of what it has read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.tiers.slots import SlotTable

Row = NDArray[np.uint8]  # [row_bytes], contiguous: one block


@dataclass(slots=True)
class TierCounters:
    """What a tier has done since its start; read from any thread."""

    stored: int = 0  # blocks
    loaded: int = 0  # blocks, before their digests were compared
    refused: Counter[str] = field(default_factory=Counter)  # blocks, by reason


class Tier(Protocol):
    """Every call but ``in`` comes on one thread; what is only read may be read from any."""

    @property
    def name(self) -> str:
        """``host`` or ``disk``, as metrics show it."""
        ...

    @property
    def slots(self) -> SlotTable:
        """What it holds, without the tiers below it."""
        ...

    @property
    def counters(self) -> TierCounters:
        """What it has done."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it takes more blocks."""
        ...

    def __contains__(self, block_hash: bytes) -> bool: ...

    def store(self, block_hash: bytes, digest: int, row: Row) -> bool:
        """Keep a copy of a block; whether it is kept."""
        ...

    def load(self, block_hash: bytes, row: Row) -> int | None:
        """Read a block into ``row``; the digest it must have, or None where it is not there."""
        ...

    def drop(self, block_hash: bytes) -> None:
        """Forget a block that was read and found to be damaged."""
        ...

    def close(self) -> None:
        """Let go of memory, files and locks."""
        ...
