"""A peer's process: started in a group of its own, asked in lines, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.peers.compare import Measure, PeerError
from bench.peers.record import Figures

STOP_TIMEOUT = 10.0  # seconds until a process that was asked to end is killed


class PeerProcess:
    """A running command whose log is kept; with ``ask`` for those that answer in lines."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._received = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def measures(self, metric: str, bound: float) -> Measure:
        """Let the process measure cases, which are dataclasses, for ``bound`` seconds in all."""
        deadline = time.monotonic() + bound

        def measure(case: Any) -> tuple[Figures, list[float]]:
            runs = self.ask(asdict(case), deadline - time.monotonic())
            return {metric: statistics.median(runs)}, runs

        return measure

    def ask(self, question: dict[str, Any] | None, timeout: float) -> Any:
        """Write a line (None: write nothing) and read one in time. Raises PeerError."""
        assert self._process.stdin is not None
        if question is not None:
            with contextlib.suppress(BrokenPipeError):  # what it said last comes below
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return json.loads(self._line(time.monotonic() + timeout))

    def check_alive(self) -> None:
        """Raises PeerError when the process has ended."""
        if self._process.poll() is not None:
            raise PeerError(f"ended with status {self._process.returncode}: {self._last_words()}")

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise PeerError("ran out of its time")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise PeerError(f"ended: {self._last_words()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """The last line of the log that looks like a reason."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1][-300:]


@contextlib.contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    cores: Sequence[int],
    log: Path,
    *,
    answers: bool,
) -> Iterator[PeerProcess]:
    """Run a command on some cores. It and its children end when the block is left.

    What it prints goes to ``log``; with ``answers`` its standard output is for ``ask``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
            stdout=subprocess.PIPE if answers else errors,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    with process:
        try:
            yield PeerProcess(process, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever of the group is left
