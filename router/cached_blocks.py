"""Which KV blocks a worker holds, as far as it has told: what prefix-aware routing looks up.

Every worker has its own set of keys, so all that is known of it ends with its session. A key is
the first 8 bytes of a block's hash. Among a million blocks two share one with a chance of 3 in
10^8, which costs a wrong guess and nothing else: workers themselves go by the whole hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from protocol.geometry import Fingerprint
from protocol.hashing import block_key, hash_block, hash_root
from protocol.messages import CacheChanges

PrefixKeys = Callable[[Fingerprint], Sequence[int]]
"""The keys of a prompt's leading blocks, in order, on workers of a fingerprint."""


class CachedBlocks:
    """The keys of one worker's findable blocks.

    ``keys`` are as of the worker's last report. What the router gave it to compute counts too,
    from the dispatch on until a report tells of it: a chat's next turn, or a prompt that begins
    alike, may come before that.
    """

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self._expected: set[int] = set()  # that no report has told of
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

    def expect(self, keys: Iterable[int]) -> None:
        """The worker computes these blocks, or has, and is yet to tell."""
        self._expected.update(keys)

    def reported(self, under_way: Iterable[Iterable[int]]) -> None:
        """The worker has told of everything that it did up to now; ``under_way`` is yet to come."""
        self._expected = set().union(*under_way)

    def leading(self, keys: Sequence[int]) -> int:
        """How many of ``keys``, from the first on, are here."""
        told, expected = self.keys, self._expected
        return next(
            (i for i, key in enumerate(keys) if key not in told and key not in expected), len(keys)
        )


class PromptPrefix:
    """A prompt's ``PrefixKeys``, each computed when it is first asked for."""

    def __init__(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        self._token_ids = token_ids
        self._root = hash_root(cache_salt)
        self._chains: dict[bytes, tuple[list[int], bytes]] = {}  # and last hash, by workers' salt

    def __call__(self, fingerprint: Fingerprint) -> Sequence[int]:
        """Keys of the full blocks before the last token, which is always computed."""
        return self._chain(fingerprint)[0]

    def continued(self, fingerprint: Fingerprint, output: Sequence[int]) -> Sequence[int]:
        """Keys of the full blocks before the last token of prompt and output."""
        keys, name = self._chain(fingerprint)
        begun = len(keys) * fingerprint.geometry.block_size
        more, _ = _follow(name, [*self._token_ids[begun:], *output], fingerprint)
        return [*keys, *more]

    def _chain(self, fingerprint: Fingerprint) -> tuple[list[int], bytes]:
        salt = fingerprint.block_salt
        if salt not in self._chains:
            self._chains[salt] = _follow(self._root, self._token_ids, fingerprint)
        return self._chains[salt]


def _follow(
    name: bytes, token_ids: Sequence[int], fingerprint: Fingerprint
) -> tuple[list[int], bytes]:
    """Keys of the full blocks before the last token, after a block ``name``, and the last name."""
    keys, size, salt = [], fingerprint.geometry.block_size, fingerprint.block_salt
    for end in range(size, len(token_ids), size):
        name = hash_block(name, token_ids[end - size : end], salt)
        keys.append(block_key(name))
    return keys, name


def no_prefix(_: Fingerprint) -> Sequence[int]:
    """``PrefixKeys`` of a prompt that shares nothing."""
    return ()


def _keys(data: bytes) -> list[int]:
    keys: list[int] = np.frombuffer(data, "<u8").tolist()
    return keys
