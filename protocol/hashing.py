"""Names for KV blocks: a hash chained over the tokens they and all their predecessors hold.

The names do not depend on the process: blake2b over little-endian uint32 token ids, never the
builtin ``hash``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16
KEY_BYTES = 8  # of a hash, by which a block is known where a mistake costs only time


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, the form in which they travel and are hashed."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def tokens_from_bytes(data: bytes) -> list[int]:
    """Inverse of ``token_bytes``."""
    tokens: list[int] = np.frombuffer(data, dtype="<u4").tolist()
    return tokens


def hash_root(cache_salt: str) -> bytes:
    """The predecessor's hash of a first block: different for every salt that a request may name."""
    if not cache_salt:
        return b""
    return hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES).digest()


def hash_block(previous: bytes, token_ids: Sequence[int], salt: bytes) -> bytes:
    """Hash of one full block given its predecessor's hash (``hash_root`` for the first).

    ``salt`` separates what must never share KV: it holds the model's fingerprint. At most 64
    bytes, else ValueError: a longer one would be cut, and separate no more.
    """
    digest = hashlib.blake2b(previous, digest_size=HASH_BYTES, key=salt)
    digest.update(token_bytes(token_ids))
    return digest.digest()


def block_key(block_hash: bytes) -> int:
    """The first ``KEY_BYTES`` of a block's hash, little-endian."""
    return int.from_bytes(block_hash[:KEY_BYTES], "little")
