"""``kvferry profile`` on the bundled model: a file that the planner takes."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from cli.main import app
from planner.profile import WorkerProfile

FEW = ["--chunks", "16", "--chunks", "64", "--histories", "0", "--histories", "64"]
FEW += ["--batches", "1", "--batches", "2", "--contexts", "16", "--contexts", "64"]


def test_a_profile_is_measured_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    result = CliRunner().invoke(
        app, ["profile", str(path), *FEW, "--repeats", "3", "--kv-tokens", "9000"]
    )
    assert result.exit_code == 0, result.output
    profile = WorkerProfile.load(str(path))
    assert (profile.name, profile.kv_tokens) == ("demo", 9000)
    assert profile.kv_bytes_per_token == 2048
    assert profile.latency.step_seconds(512, 512**2, 0, 0) > 0
    assert profile.latency.step_seconds(0, 0, 4, 256) > 0


def test_a_profile_counts_the_bytes_that_travel(tmp_path: Path) -> None:
    """The demo model's 2048 bytes in bf16 are 1024 and a scale for each 64 of them."""
    path = tmp_path / "demo.json"
    result = CliRunner().invoke(
        app, ["profile", str(path), *FEW, "--repeats", "3", "--wire-quantization", "int8"]
    )
    assert result.exit_code == 0, result.output
    assert WorkerProfile.load(str(path)).kv_bytes_per_token == 1024 + 4 * 1024 // 64


def test_more_than_the_models_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    result = CliRunner().invoke(app, ["profile", str(path), "--contexts", "999999"])
    assert result.exit_code != 0
    assert not path.exists()
