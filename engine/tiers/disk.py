"""Blocks in a file on a local disk. They outlive the process.

Three files in a directory that one process owns at a time: ``lock``, ``blocks`` with a slot of
``row_bytes`` for each block, and ``index`` (see ``engine.tiers.records``). A slot's record is
erased before the slot is overwritten and written after it, so that a process killed in between
leaves an empty slot. Nothing is flushed: after a loss of power a slot may be torn whatever its
record says, and its digest shows it to whoever reads it.

The first write that fails, as it does on a full disk, is the last one: the tier then only reads.
"""

from __future__ import annotations

import fcntl
import logging
import os
from array import array
from contextlib import ExitStack
from pathlib import Path

from engine.memory import size_text
from engine.tiers.records import (
    EMPTY,
    HEADER_BYTES,
    RECORD_BYTES,
    Record,
    pack_header,
    unpack_records,
)
from engine.tiers.slots import SlotTable
from engine.tiers.tier import Row, TierCounters
from protocol.errors import ConfigError

log = logging.getLogger(__name__)


class DiskTier:
    """At most ``max_bytes`` of blocks in ``directory``, which is made if there is none.

    ``fingerprint``, at most 64 bytes, names whose KV this is; that of another is discarded.
    Raises ConfigError when the directory is in use, cannot be used, or is on too small a disk.
    """

    name = "disk"

    def __init__(self, directory: Path, max_bytes: int, row_bytes: int, fingerprint: bytes) -> None:
        if max_bytes < row_bytes:
            raise ConfigError(f"{max_bytes} bytes hold no KV block: one has {row_bytes}")
        self._directory = directory
        self._row_bytes = row_bytes
        self._age = 0  # of the newest block
        self.writable = True
        self.counters = TierCounters()
        try:
            with ExitStack() as files:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                files.callback(os.close, _lock(directory))
                self._data = _open(directory / "blocks")
                files.callback(os.close, self._data)
                self._index = _open(directory / "index")
                files.callback(os.close, self._index)
                self._check_room(max_bytes)
                self.slots = SlotTable(max_bytes // row_bytes)
                self._digests = array("Q", bytes(8 * self.slots.num_slots))  # by slot
                self._recover(pack_header(row_bytes, fingerprint))
                self._files = files.pop_all()
        except OSError as error:
            raise ConfigError(f"KV cannot be kept in {directory}: {error}") from error

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self.slots

    def store(self, block_hash: bytes, digest: int, row: Row) -> bool:
        """Write a block; False when the disk does not take it."""
        if block_hash in self.slots:
            return True
        if not self.writable:
            self.counters.refused["not_writable"] += 1
            return False
        slot = self.slots.add(block_hash)
        self._age += 1
        try:
            self._write_record(slot, EMPTY)
            _write(self._data, row.data, slot * self._row_bytes)
            self._write_record(slot, Record(block_hash, digest, self._age).pack())
        except OSError as error:
            self.slots.drop(block_hash)
            self.writable = False
            self.counters.refused["not_writable"] += 1
            log.error("no more KV is written to %s: %s", self._directory, error)
            return False
        self._digests[slot] = digest
        self.counters.stored += 1
        return True

    def load(self, block_hash: bytes, row: Row) -> int | None:
        """Read a block; None when it is not there or cannot be read, and is then forgotten."""
        slot = self.slots.find(block_hash)
        if slot is None:
            return None
        try:
            count = os.preadv(self._data, [row.data], slot * self._row_bytes)
        except OSError as error:
            log.warning("a KV block in %s cannot be read: %s", self._directory, error)
            count = 0
        if count < self._row_bytes:
            self.drop(block_hash)
            return None
        self.counters.loaded += 1
        return self._digests[slot]

    def drop(self, block_hash: bytes) -> None:
        """Forget a damaged block, on the disk too."""
        slot = self.slots.drop(block_hash)
        if slot is None:
            return
        self.counters.refused["damaged"] += 1
        try:
            self._write_record(slot, EMPTY)
        except OSError as error:  # found damaged again after a restart
            log.warning("a damaged KV block stays in %s: %s", self._directory, error)

    def close(self) -> None:
        """Close the files; another process may have the directory."""
        self._files.close()

    def _check_room(self, max_bytes: int) -> None:
        """Refuse what the disk cannot hold now; it may fill up later all the same."""
        disk = os.fstatvfs(self._data)
        free = disk.f_bavail * disk.f_frsize + os.fstat(self._data).st_blocks * 512
        if free < max_bytes:
            wanted, have = size_text(max_bytes), size_text(free)
            raise ConfigError(f"{wanted} of KV do not fit in {self._directory}: {have} are free")

    def _recover(self, header: bytes) -> None:
        """Take over what a former process left, if it is of the same model and format."""
        former = os.pread(self._index, HEADER_BYTES, 0)
        if former != header:
            if former:
                log.warning("%s held KV of another model: discarded", self._directory)
            os.truncate(self._index, 0)
            os.truncate(self._data, 0)
            _write(self._index, memoryview(header), 0)
        os.truncate(self._index, HEADER_BYTES + self.slots.num_slots * RECORD_BYTES)
        os.truncate(self._data, self.slots.num_slots * self._row_bytes)
        found = unpack_records(_read_all(self._index)[HEADER_BYTES:])
        newest: dict[bytes, int] = {}
        for slot, record in sorted(found, key=lambda entry: entry[1].age):
            newest.pop(record.block_hash, None)
            newest[record.block_hash] = slot
            self._digests[slot] = record.digest
            self._age = record.age
        self.slots.fill(newest.items())
        if newest:
            log.info("%s holds %d KV blocks of a former process", self._directory, len(newest))

    def _write_record(self, slot: int, record: bytes) -> None:
        _write(self._index, memoryview(record), HEADER_BYTES + slot * RECORD_BYTES)


def _lock(directory: Path) -> int:
    """Own the directory until the process ends, however that happens."""
    lock = _open(directory / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise ConfigError(
            f"{directory} is in use by process {owner}: every worker needs one of its own"
        ) from None
    os.truncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    return lock


def _open(path: Path) -> int:
    """Readable by its owner only: KV tells what was asked."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _read_all(file: int) -> bytes:
    size, parts, offset = os.fstat(file).st_size, [], 0
    while offset < size and (part := os.pread(file, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
