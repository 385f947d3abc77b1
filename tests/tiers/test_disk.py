"""The disk tier: what it keeps, what outlives the process, and what damage does."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from engine.tiers.disk import DiskTier
from engine.tiers.records import HEADER_BYTES, RECORD_BYTES
from engine.tiers.tier import Row
from protocol.errors import ConfigError
from tests.tiers.blocks import block, digest_of, name

ROW_BYTES = 256
FINGERPRINT = b"a model"


def tier(directory: Path, num_slots: int = 4, fingerprint: bytes = FINGERPRINT) -> DiskTier:
    return DiskTier(directory, num_slots * ROW_BYTES + 7, ROW_BYTES, fingerprint)


def put(disk: DiskTier, number: int) -> bool:
    row = block(number, ROW_BYTES)
    return disk.store(name(number), digest_of(row), row)


def read(disk: DiskTier, number: int) -> Row | None:
    """The block if it is there and whole, as its reader would find."""
    row = np.empty(ROW_BYTES, np.uint8)
    digest = disk.load(name(number), row)
    if digest is None or digest != digest_of(row):
        return None
    assert np.array_equal(row, block(number, ROW_BYTES))
    return row


def held(disk: DiskTier) -> list[int]:
    return [number for number in range(300) if read(disk, number) is not None]


def test_the_newest_blocks_are_there_and_the_files_stay_within_their_bound(tmp_path: Path) -> None:
    disk = tier(tmp_path / "kv")
    for number in range(9):
        assert put(disk, number)
        assert put(disk, number)  # once more changes nothing
        assert os.path.getsize(tmp_path / "kv" / "blocks") <= 4 * ROW_BYTES
    assert held(disk) == [5, 6, 7, 8]
    assert disk.slots.num_evicted == 5
    assert disk.counters.stored == 9
    disk.close()


def test_blocks_outlive_the_process_with_their_order(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    for number in range(6):
        put(disk, number)
    disk.close()
    again = tier(tmp_path)
    assert held(again) == [2, 3, 4, 5]
    put(again, 6)
    again.close()
    assert held(tier(tmp_path)) == [3, 4, 5, 6]


@pytest.mark.parametrize("num_slots", [2, 9])
def test_the_bound_may_change_between_starts(tmp_path: Path, num_slots: int) -> None:
    disk = tier(tmp_path, 4)
    for number in range(4):
        put(disk, number)
    disk.close()
    other = tier(tmp_path, num_slots)
    assert len(held(other)) == min(num_slots, 4)
    for number in range(10, 30):
        put(other, number)
    assert os.path.getsize(tmp_path / "blocks") <= num_slots * ROW_BYTES
    assert len(held(other)) == num_slots


def test_another_models_blocks_are_discarded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tier(tmp_path)
    put(disk, 1)
    disk.close()
    other = tier(tmp_path, fingerprint=b"another model")
    assert held(other) == []
    assert "another model: discarded" in caplog.text
    other.close()
    assert held(tier(tmp_path)) == []


def test_two_workers_cannot_share_a_directory(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        tier(tmp_path)
    disk.close()
    tier(tmp_path).close()


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hold no KV block"):
        DiskTier(tmp_path, ROW_BYTES - 1, ROW_BYTES, FINGERPRINT)
    with pytest.raises(ConfigError, match="are free"):
        DiskTier(tmp_path, 1 << 60, ROW_BYTES, FINGERPRINT)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be kept"):
        tier(tmp_path / "file")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be kept in /proc/kvferry"):
        tier(Path("/proc/kvferry"))
    disk = tier(tmp_path)
    put(disk, 1)
    disk.close()
    for path in (tmp_path / "blocks", tmp_path / "index", tmp_path / "lock"):
        path.rename(tmp_path / "away")
        path.mkdir()
        with pytest.raises(ConfigError, match="cannot be kept"):
            tier(tmp_path)
        path.rmdir()
        (tmp_path / "away").rename(path)
    assert held(tier(tmp_path)) == [1]  # nothing of a refused start is in its way


@pytest.mark.parametrize("kind", ["flipped", "zeroed", "exchanged"])
def test_damage_to_a_block_is_found_and_only_that_block_is_lost(tmp_path: Path, kind: str) -> None:
    disk = tier(tmp_path)
    for number in range(4):
        put(disk, number)
    data = bytearray((tmp_path / "blocks").read_bytes())
    match kind:
        case "flipped":
            data[ROW_BYTES + 100] ^= 1
        case "zeroed":
            data[ROW_BYTES : 2 * ROW_BYTES] = bytes(ROW_BYTES)
        case _:
            data[ROW_BYTES : 2 * ROW_BYTES] = data[:ROW_BYTES]
    (tmp_path / "blocks").write_bytes(data)
    assert held(disk) == [0, 2, 3]
    disk.drop(name(1))  # as its reader does
    assert disk.counters.refused["damaged"] == 1
    assert name(1) not in disk
    disk.close()
    again = tier(tmp_path)
    assert name(1) not in again
    assert put(again, 1)
    assert held(again) == [0, 1, 2, 3]


def test_truncated_files_lose_blocks_and_nothing_else(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    for number in range(4):
        put(disk, number)
    os.truncate(tmp_path / "blocks", 2 * ROW_BYTES + 50)
    assert held(disk) == [0, 1]
    assert disk.counters.refused["damaged"] == 2
    put(disk, 4)
    disk.close()
    os.truncate(tmp_path / "index", HEADER_BYTES + RECORD_BYTES + 10)
    assert held(tier(tmp_path)) == [0]


def test_random_bytes_in_the_index_are_no_blocks(tmp_path: Path) -> None:
    disk = tier(tmp_path, 64)
    for number in range(64):
        put(disk, number)
    disk.close()
    index = bytearray((tmp_path / "index").read_bytes())
    random = Random(1)
    for _ in range(40):
        index[random.randrange(HEADER_BYTES, len(index))] ^= 1 << random.randrange(8)
    (tmp_path / "index").write_bytes(index)
    again = tier(tmp_path, 64)
    assert set(held(again)) < set(range(64))  # ``held`` compares every byte
    assert len(again.slots) < 64


def test_a_full_disk_ends_writing_and_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tier(tmp_path)
    for number in range(4):
        put(disk, number)
    write = os.pwrite

    def full(file: int, data: memoryview, offset: int) -> int:
        if len(data) == ROW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.ERROR):
        assert not put(disk, 4)
    assert "No space left" in caplog.text
    assert not disk.writable
    assert not put(disk, 5)
    assert disk.counters.refused["not_writable"] == 2
    assert held(disk) == [1, 2, 3]
    disk.close()
    assert held(tier(tmp_path)) == [1, 2, 3]


WRITER = """
import sys
from pathlib import Path
from tests.tiers.blocks import block, digest_of, name
from engine.tiers.disk import DiskTier
disk = DiskTier(Path(sys.argv[1]), 64 * 65536, 65536, b"a model")
print("ready", flush=True)
number = 0
while True:
    row = block(number % 300, 65536)
    disk.store(name(number % 300), digest_of(row), row)
    number += 1
"""


def test_a_process_killed_while_it_writes_leaves_only_whole_blocks(tmp_path: Path) -> None:
    random = Random(2)
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(0.1 + 0.1 * random.random())
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        disk = DiskTier(tmp_path, 64 * 65536, 65536, b"a model")
        row = np.empty(65536, np.uint8)
        count = 0
        for number in range(300):
            digest = disk.load(name(number), row)
            if digest is not None:
                count += 1
                assert digest == digest_of(row)
                assert np.array_equal(row, block(number, 65536))
        assert 0 < count == len(disk.slots) <= 64
        disk.close()
