"""The index file of a disk tier: what each slot of its data file holds.

A header names the format, the size of a slot and the KV fingerprint; one record for each slot
follows. All numbers are little-endian. A record counts only if its checksum is right: one that was
half written, or never, is an empty slot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.hashing import HASH_BYTES

_HEADER = struct.Struct("<16sQ64s")  # magic, bytes of a slot, fingerprint
_RECORD = struct.Struct(f"<{HASH_BYTES}sQQ")  # hash, digest, age
_CHECKSUM = struct.Struct("<I")  # CRC-32 of all before it
_MAGIC = b"kvferry tier 1\n\0"

HEADER_BYTES = 128
RECORD_BYTES = 64  # none lies across two sectors
EMPTY = bytes(RECORD_BYTES)


@dataclass(frozen=True, slots=True)
class Record:
    """One slot's content. ``age`` counts stores: the larger was stored later."""

    block_hash: bytes
    digest: int
    age: int

    def pack(self) -> bytes:
        """As ``RECORD_BYTES`` of the file."""
        return _sealed(_RECORD.pack(self.block_hash, self.digest, self.age), RECORD_BYTES)


def pack_header(row_bytes: int, fingerprint: bytes) -> bytes:
    """The first ``HEADER_BYTES`` of the file. ``fingerprint`` has at most 64 bytes."""
    return _sealed(_HEADER.pack(_MAGIC, row_bytes, fingerprint), HEADER_BYTES)


def unpack_records(data: bytes) -> Iterator[tuple[int, Record]]:
    """The slots that hold something, and what, from what follows the header."""
    for slot, start in enumerate(range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES)):
        packed = data[start : start + _RECORD.size]
        (checksum,) = _CHECKSUM.unpack_from(data, start + _RECORD.size)
        if any(packed) and checksum == zlib.crc32(packed):
            yield slot, Record(*_RECORD.unpack(packed))


def _sealed(content: bytes, size: int) -> bytes:
    return (content + _CHECKSUM.pack(zlib.crc32(content))).ljust(size, b"\0")
