"""A router and workers as separate processes, started through the command line."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

START = 120.0  # seconds, generous: two cores may be starting many processes
IDLE = 5.0  # seconds in which everything must be given back


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def eventually(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll until the condition holds; False if it never did."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Stack:
    """``with Stack(model, ...) as stack``: serving when entered, gone without trace when left.

    ``prefill`` and ``decode`` hold one list of extra arguments for each worker. KV travels over
    UCX, as it does between hosts, unless ``transport`` says ``auto``; and it travels for every
    prompt, unless ``router`` says who computes them.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        prefill: Sequence[Sequence[str]] = ((),),
        decode: Sequence[Sequence[str]] = ((),),
        router: Sequence[str] = (),
        worker: Sequence[str] = (),
        control: str | None = None,
        transport: str = "ucx",
        host: str = "127.0.0.1",
    ) -> None:
        self.model = str(model)
        self.directory = Path(tempfile.mkdtemp(prefix="kvferry-test-"))
        self.control = control or f"ipc://{self.directory}/router.sock"
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        # One for all threads: making a client takes longer than a short answer.
        limits = httpx.Limits(max_connections=64)
        self.client = httpx.Client(base_url=self.url, timeout=240, limits=limits)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        decided = not prefill or "--disaggregation" in router
        self._router_arguments = router if decided else ("--disaggregation", "always", *router)
        self._worker_arguments = ("--transport", transport, *worker)
        self._pools = {"prefill": prefill, "decode": decode}

    def __enter__(self) -> Self:
        try:
            self.start_router()
            for role, pool in self._pools.items():
                for index, arguments in enumerate(pool):
                    self.start_worker(role, f"{role}-{index}", arguments)
            self.wait_for_workers(sum(map(len, self._pools.values())))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        codes = self.close()
        if error is None:
            assert set(codes.values()) == {0}, codes

    def start_router(self) -> None:
        """Start the router process."""
        arguments = ["router", "--model", self.model, "--control", self.control]
        arguments += ["--port", str(self.port), "--served-model-name", "test"]
        self._start("router", [*arguments, *self._router_arguments])

    def start_worker(self, role: str, name: str, arguments: Sequence[str] = ()) -> None:
        """Start one worker process."""
        command = ["worker", "--role", role, "--router", self.control, "--worker-id", name]
        self._start(name, [*command, "--model", self.model, *self._worker_arguments, *arguments])

    def launcher(self, name: str) -> Sequence[str]:
        """The command that a process is started by; a subclass may give each a host of its own."""
        return ()

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.launcher(name), sys.executable, "-m", "cli.main", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def log(self, name: str) -> str:
        """What a process printed so far."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def wait_for_workers(self, count: int, timeout: float = START) -> None:
        """Until ``count`` workers are registered and serving."""

        def all_serving() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)}"
            try:
                serving = [w for w in self.workers() if w["state"] == "serving"]
            except httpx.TransportError:
                return False
            return len(serving) == count

        assert eventually(all_serving, timeout), {n: self.log(n) for n in self.processes}

    def workers(self) -> list[dict[str, Any]]:
        """``GET /admin/workers``."""
        answer = self.client.get("/admin/workers")
        workers: list[dict[str, Any]] = answer.raise_for_status().json()["workers"]
        return workers

    def metrics(self, role: str) -> dict[str, float]:
        """Samples of every worker of a role, added up; labels are part of the key."""
        total: dict[str, float] = {}
        for worker in self.workers():
            if worker["role"] == role:
                for name, value in scrape(worker["metrics"], self.client).items():
                    total[name] = total.get(name, 0.0) + value
        return total

    def assert_idle(self) -> None:
        """Nothing leaks: used blocks, grants, leases and open transfers return to zero."""
        left = self.not_given_back(IDLE)
        assert not left, left

    def not_given_back(self, timeout: float) -> dict[str, float]:
        """What of the workers' gauges is not zero yet after at most ``timeout`` seconds.

        Named by worker and gauge.
        """
        gauges = (
            "kvferry_kv_blocks_used",
            "kvferry_kv_grants_open",
            "kvferry_kv_leases_open",
            "kvferry_kv_transfer_open_grants",
            "kvferry_kv_transfer_in_flight",
            "kvferry_num_requests_running",
            "kvferry_num_requests_waiting",
        )
        left: dict[str, float] = {}

        def idle() -> bool:
            left.clear()
            for worker in self.workers():
                metrics = scrape(worker["metrics"], self.client)
                left.update({f"{worker['id']} {g}": metrics[g] for g in gauges if metrics[g]})
            return not left

        eventually(idle, timeout)
        return left

    def close(self) -> dict[str, int]:
        """End every process; their exit statuses by name."""
        self.client.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes: dict[str, int] = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        return codes


def scrape(url: str, client: httpx.Client) -> dict[str, float]:
    """A /metrics page as ``name{label=value,...}`` to value."""
    page = client.get(url).raise_for_status().text
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples
