"""kvferry bench from the command line: against an endpoint made up here, and against the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.checkpoint import DEMO_MODEL
from cli.main import app
from tests.bench.serving_endpoint import FakeEndpoint, serving, speaker
from tests.stack import Stack


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "160"})


def test_a_run_writes_all_it_knows(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "csv", "html")}
    with serving(FakeEndpoint(speaker(ttft=0.02, tpot=0.002))) as endpoint:
        options = ["--rate", "50", "--arrival-cv", "0", "--num-requests", "20", "--warmup", "2"]
        options += ["--prompt-tokens", "8-16", "--output-tokens", "5", "--api-key", "secret"]
        options += ["--output", str(files["json"]), "--csv", str(files["csv"])]
        done = bench("--url", endpoint.url, *options, "--html", str(files["html"]))
    assert done.exit_code == 0, done.output
    assert "20 of 20 requests" in done.output
    assert len(endpoint.bodies) == 22
    assert set(endpoint.keys) == {"Bearer secret"}
    figures = json.loads(files["json"].read_text())["figures"]
    assert (figures["completed"], figures["output_tokens"]) == (20, 100)
    assert figures["ttft"]["p50"] >= 0.019
    assert files["csv"].read_text().count("\n") == 21
    assert files["html"].read_text().startswith("<!doctype html>")
    assert not any("secret" in file.read_text() for file in files.values())


def test_the_command_needs_no_torch() -> None:
    program = """
import sys, cli.bench, bench.serving.session, bench.serving.report
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=DEMO_MODEL.parents[1], check=True)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ttft in zip(paths, (0.01, 0.15), strict=True):
        with serving(FakeEndpoint(speaker(ttft=ttft))) as endpoint:
            options = ["--concurrency", "4", "--num-requests", "16", "--output-tokens", "2"]
            assert bench("--url", endpoint.url, *options, "--output", str(path)).exit_code == 0
    done = bench("compare", *map(str, paths))
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if "TTFT p50" in line]
    assert "differs" in row
    assert "not the same load" not in done.output
    other = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps({**other, "settings": {**other["settings"], "seed": 7}}))
    assert "not the same load: seed 0 and 7" in bench("compare", *map(str, paths)).output


def test_a_sweep_finds_where_a_single_server_gives_up(tmp_path: Path) -> None:
    """One request at a time, 50 ms each: it holds well below 20 a second and not well above."""
    path = tmp_path / "sweep.json"
    with serving(FakeEndpoint(speaker(ttft=0.05), one_at_a_time=True)) as endpoint:
        options = ["--sweep", "--rate", "8", "--num-requests", "20", "--arrival-cv", "0"]
        options += ["--output-tokens", "2", "--slo-ttft", "250", "--sweep-tolerance", "0.5"]
        done = bench("--url", endpoint.url, *options, "--warmup", "0", "--output", str(path))
    assert done.exit_code == 0, done.output
    assert "the highest rate found" in done.output
    figures = json.loads(path.read_text())["figures"]
    assert figures["knee"] == figures["rate"]
    assert figures["knee"] < 64
    assert figures["attainment"] >= 0.9


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--concurrency", "2", "--rate", "1"], "a closed loop has no --rate"),
        (["--concurrency", "2", "--arrival-cv", "0"], "a closed loop has no --rate"),
        (["--prompt-tokens", "few"], "lengths 'few'"),
        (["--url", "http://me:secret@host"], "takes an API key"),
        (["--url", "http://host:many"], "'http://host:many'"),
        (["--token-range", "9", "9"], "must lie above"),
        (["--extra-body", "[]"], "no JSON object"),
        (["--url", "ftp://host"], "no http address"),
        (["--trace", "/nowhere.csv", "--model", "m", "--warmup", "0"], "cannot read the trace"),
        (["--url", "http://127.0.0.1:9", "--model", "m"], "no warm-up request succeeds: connect"),
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["compare", "/nowhere.json", "/nowhere.json"], "cannot read"),
    ],
)
def test_mistakes_end_with_the_reason(words: list[str], reason: str) -> None:
    done = bench(*words)
    assert done.exit_code != 0
    assert reason in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_the_demo_model_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    with Stack(DEMO_MODEL) as stack:
        options = ["--num-requests", "6", "--rate", "3", "--warmup", "1", "--max-len", "256"]
        lengths = ["--prompt-tokens", "40", "--output-tokens", "8"]
        for api in ("completions", "chat"):
            done = bench(
                "--url", stack.url, "--api", api, *options, *lengths, "--output", str(path)
            )
            assert done.exit_code == 0, done.output
            figures = json.loads(path.read_text())["figures"]
            assert (figures["completed"], figures["output_tokens"]) == (6, 48)
            assert figures["prompt_tokens"] == pytest.approx(240, rel=0.25)
            assert 0 < figures["ttft"]["p50"] < figures["e2e"]["p50"]
