"""Which KV blocks a worker holds, as far as it has told: what prefix-aware routing looks up.

Every worker has its own set of keys, so all that is known of it ends with its session. A key is
the first 8 bytes of a block's hash. Among a million blocks two share one with a chance of 3 in
10^8, which costs a wrong guess and nothing else: workers themselves go by the whole hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from protocol.geometry import Fingerprint
from protocol.hashing import block_key, hash_block, hash_root
from protocol.messages import CacheChanges

PrefixKeys = Callable[[Fingerprint], Sequence[int]]
"""The keys of a prompt's leading blocks, in order, on workers of a fingerprint."""


class CachedBlocks:
    """The keys of one worker's findable blocks."""

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self._next = 0  # number of the message to come; 0: a snapshot

    def apply(self, message: CacheChanges) -> bool:
        """Take a worker's message. False: one before it is missing, a snapshot is needed."""
        if message.number == 0:
            self.keys.clear()
        elif message.number != self._next:
            return False
        self._next = message.number + 1
        self.keys.difference_update(_keys(message.evicted))
        self.keys.update(_keys(message.stored))
        return True

    def leading(self, keys: Sequence[int]) -> int:
        """How many of ``keys``, from the first on, are here."""
        known = self.keys
        return next((i for i, key in enumerate(keys) if key not in known), len(keys))


class PromptPrefix:
    """A prompt's ``PrefixKeys``, each computed when it is first asked for."""

    def __init__(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        self._token_ids = token_ids
        self._cache_salt = cache_salt
        self._keys: dict[bytes, list[int]] = {}  # by the workers' salt

    def __call__(self, fingerprint: Fingerprint) -> Sequence[int]:
        """Keys of the full blocks before the last token, which is always computed."""
        salt = fingerprint.block_salt
        if salt not in self._keys:
            self._keys[salt] = self._compute(salt, fingerprint.geometry.block_size)
        return self._keys[salt]

    def _compute(self, salt: bytes, size: int) -> list[int]:
        keys, name = [], hash_root(self._cache_salt)
        for end in range(size, len(self._token_ids), size):
            name = hash_block(name, self._token_ids[end - size : end], salt)
            keys.append(block_key(name))
        return keys


def no_prefix(_: Fingerprint) -> Sequence[int]:
    """``PrefixKeys`` of a prompt that shares nothing."""
    return ()


def _keys(data: bytes) -> list[int]:
    keys: list[int] = np.frombuffer(data, "<u8").tolist()
    return keys
