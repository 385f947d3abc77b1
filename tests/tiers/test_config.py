"""What a user may ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cli.main import app
from cli.sizes import checked_size, parse_size
from engine.tiers.config import TierConfig, open_tiers
from protocol.errors import ConfigError

ROWS = torch.zeros((4, 8), dtype=torch.int64)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("10GiB", 10 << 30), ("1.5 KiB", 1536), ("2TB", 2 * 10**12), ("0MB", 0)],
)
def test_sizes_as_people_write_them(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert checked_size(text) == text


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "10gib", "10G", "1.5", "1e3MB", "10 GiB 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
    if text:
        with pytest.raises(typer.BadParameter):
            checked_size(text)


def test_a_cpu_worker_needs_no_host_tier(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv-host-size is for GPU workers"):
        open_tiers(TierConfig(host_bytes=1 << 20, disk_dir=tmp_path), ROWS, b"")
    assert not list(tmp_path.iterdir())
    assert open_tiers(TierConfig(), ROWS, b"") == []
    (disk,) = open_tiers(TierConfig(disk_dir=tmp_path, disk_bytes=640), ROWS, b"")
    assert disk.slots.num_slots == 10
    disk.close()


def test_the_command_line_refuses_what_is_no_size() -> None:
    worker = ["worker", "--role", "prefill", "--router", "ipc:///nowhere"]
    answer = CliRunner().invoke(app, [*worker, "--kv-disk-size", "much"])
    assert answer.exit_code == 2
    assert "is not a size" in answer.output
