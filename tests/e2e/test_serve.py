"""``kvferry serve`` as a newcomer runs it: starts, says what it is, ends without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cli.serve import WORKER_NICENESS
from tests.stack import eventually, free_port

NUM_SEQUENCES = 16


class Serve:
    """A running ``kvferry serve`` and what it printed."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.port = free_port()
        self.directory = directory
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(directory), "COLUMNS": "160"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line

    def wait(self) -> int:
        try:
            code = self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            raise
        self._reader.join(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def endless_stream(port: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of answers that take longer than the router has to end in."""
    body = {"model": "kvferry-demo", "prompt": [300], "n": NUM_SEQUENCES, "ignore_eos": True}
    body |= {"max_tokens": 2000, "stream": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=30) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines())
        yield (json.loads(line) for line in lines if line not in ("", "[DONE]"))


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "kvferry" in name or "ucx" in name}


@pytest.fixture
def short_directory() -> Path:
    """A Unix socket's path may not be long."""
    return Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_and_leaves_nothing_behind(short_directory: Path, number: signal.Signals) -> None:
    segments = shared_memory()
    serve = Serve(short_directory)
    assert eventually(lambda: "curl" in serve.text or serve.process.poll() is not None, 120)
    children = psutil.Process(serve.process.pid).children(recursive=True)
    assert len(children) == 3
    nice = psutil.Process().nice()
    assert sorted(child.nice() for child in children) == [nice, *2 * [nice + WORKER_NICENESS]]
    assert "prefill-0" in serve.text
    assert "decode-0" in serve.text
    assert "tcp" in serve.text
    models = httpx.get(f"http://127.0.0.1:{serve.port}/v1/models", timeout=30).json()
    assert models["data"][0]["id"] == "kvferry-demo"
    with endless_stream(serve.port) as events:
        while next(events)["choices"][0]["index"] < NUM_SEQUENCES - 1:
            pass  # they begin in order
        serve.process.send_signal(number)
        assert list(events)[-1]["error"]["message"] == "the router is shutting down"
    assert serve.wait() == 0, serve.text
    assert "Traceback" not in serve.text
    assert not [child for child in children if child.is_running()]
    assert list(short_directory.iterdir()) == []
    assert shared_memory() == segments


def test_children_end_with_a_killed_parent(short_directory: Path) -> None:
    serve = Serve(short_directory)
    assert eventually(lambda: "curl" in serve.text or serve.process.poll() is not None, 120)
    children = psutil.Process(serve.process.pid).children(recursive=True)
    serve.process.kill()
    serve.wait()
    assert eventually(lambda: not any(child.is_running() for child in children), 30)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "/does/not/exist"], "/does/not/exist"),
        (["--num-kv-blocks", "2"], "KV"),
        (["--require-transport", "rc_mlx5"], "rc_mlx5"),
        (["--max-model-len", "999999"], "999999"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_command(
    short_directory: Path, arguments: list[str], reason: str
) -> None:
    serve = Serve(short_directory, *arguments)
    assert serve.wait() == 1
    assert reason in serve.text.splitlines()[-1]
    assert list(short_directory.iterdir()) == []


def test_a_taken_port_ends_the_command(short_directory: Path) -> None:
    first = Serve(short_directory)
    assert eventually(lambda: "curl" in first.text or first.process.poll() is not None, 120)
    second = Serve(short_directory, "--port", str(first.port))
    assert second.wait() == 1
    assert str(first.port) in second.text.splitlines()[-1]
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 0
