"""``kvferry serve``: a router and its workers as separate processes on this host.

Owns the children and a private directory for their sockets. Every child ends with this process,
whatever ends it; the directory is removed.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import urllib.request
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.placement import Placement, add_niceness, place
from protocol.errors import ConfigError
from protocol.logs import LogFormat

PR_SET_PDEATHSIG = 1
# Rounds that a thread waits for the others of its step before it leaves its core: none at all
# makes every barrier a system call, GNU OpenMP's default starves whoever shares the core.
SPINS = "5000"
WORKER_NICENESS = 5  # behind the router, whose work on a token or a request is short
STOP_TIMEOUT = 10.0  # seconds until a child that was asked to stop is killed
START_TIMEOUT = 600.0  # seconds; loading a large model from a slow disk takes a while


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The local deployment. What ends in ``_args`` is passed on as it is."""

    model: str
    num_prefill: int
    num_decode: int
    host: str
    port: int
    api_key: str | None
    admin_key: str | None = None
    disaggregation: str = "auto"
    log_format: LogFormat = "text"
    threads_per_worker: int | None = None  # None: the worker's share of the cores
    pin: bool | None = None  # to its share; None: where that has more than one core
    router_args: Sequence[str] = ()
    worker_args: Sequence[str] = ()
    tier_args: Sequence[str] = ()  # of workers that compute prompts
    kv_disk_dir: Path | None = None  # of which each of them gets a folder


@dataclass(slots=True, eq=False)
class Child:
    """One process and the last lines it said."""

    name: str
    process: asyncio.subprocess.Process
    placement: Placement | None  # of a worker
    said: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def reason(self) -> str:
        """Why it ended, in one line."""
        code = self.process.returncode
        assert code is not None
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"{self.name} was killed by {signal.Signals(-code).name}{hint}"
        said = next((line for line in reversed(self.said) if line.strip()), "it said nothing")
        return f"{self.name} ended with status {code}: {said}"


async def serve(config: ServeConfig, console: Console) -> None:
    """Run until SIGINT or SIGTERM. Raises ConfigError when a process ends before all serve."""
    _check(config)
    directory = Path(tempfile.mkdtemp(prefix="kvferry-"))
    children: list[Child] = []
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        try:
            control = f"ipc://{directory}/router.sock"
            router, *workers = _commands(config, control)
            children.append(await _start(*router, None))
            for command, placement in zip(workers, _placements(config), strict=True):
                children.append(await _start(*command, placement))
            for child in children:
                tasks.create_task(_relay(child, config.log_format))
            stopping = asyncio.create_task(stop.wait())
            starting = asyncio.create_task(_wait_until_ready(config, children))
            await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                starting.result()
                _print_state(config, children, console)
                await _watch(children, stopping, console)
            starting.cancel()
            stopping.cancel()
        finally:
            await _stop(children)
            shutil.rmtree(directory, ignore_errors=True)


def _check(config: ServeConfig) -> None:
    """Raise ConfigError where a worker, or an option about it, would be of no use."""
    if config.num_prefill == 0 and config.disaggregation == "always":
        raise ConfigError("--disaggregation always needs prefill workers: --prefill is 0")
    if config.num_prefill > 0 and config.disaggregation == "never":
        raise ConfigError("--disaggregation never leaves prefill workers idle: give --prefill 0")


def _commands(config: ServeConfig, control: str) -> list[tuple[str, list[str]]]:
    router = ["router", "--model", config.model, "--control", control]
    router += ["--log-format", config.log_format]
    router += ["--host", config.host, "--port", str(config.port), *config.router_args]
    commands = [("router", router)]
    for role, count in (("prefill", config.num_prefill), ("decode", config.num_decode)):
        for index in range(count):
            name = f"{role}-{index}"
            worker = ["worker", "--model", config.model, "--role", role, "--router", control]
            worker += ["--worker-id", name, "--log-format", config.log_format, *config.worker_args]
            if role == "prefill" or config.num_prefill == 0:
                worker += config.tier_args
                if config.kv_disk_dir is not None:
                    worker += ["--kv-disk-dir", str(config.kv_disk_dir / name)]
            commands.append((name, worker))
    return commands


def _placements(config: ServeConfig) -> list[Placement]:
    cores = sorted(os.sched_getaffinity(0))
    num_workers = config.num_prefill + config.num_decode
    threads = config.threads_per_worker or int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    return place(cores, num_workers, threads, config.pin)


async def _start(name: str, arguments: list[str], placement: Placement | None) -> Child:
    environment = {"GOMP_SPINCOUNT": SPINS, **os.environ}
    if placement is not None:
        environment["OMP_NUM_THREADS"] = str(placement.threads)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cli.main",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # the terminal's Ctrl-C reaches this process only
        preexec_fn=partial(_prepare, placement),
    )
    return Child(name, process, placement)


def _prepare(placement: Placement | None) -> None:
    """Called in the child: it dies with its parent; a worker gives way, and keeps to its cores."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if placement is None:
        return
    add_niceness(WORKER_NICENESS)
    if placement.cores is not None:
        os.sched_setaffinity(0, placement.cores)


async def _relay(child: Child, log_format: LogFormat) -> None:
    """Pass on what the child prints: text under its name, which is in JSON already."""
    assert child.process.stdout is not None
    async for line in child.process.stdout:
        text = line.decode(errors="replace").rstrip()
        child.said.append(text)
        sys.stderr.write(f"{child.name}: {text}\n" if log_format == "text" else f"{text}\n")


async def _wait_until_ready(config: ServeConfig, children: list[Child]) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not await asyncio.to_thread(_all_registered, config):
                _raise_if_ended(children)
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ConfigError(f"not all workers were ready after {START_TIMEOUT:.0f} s") from None


def _raise_if_ended(children: list[Child]) -> None:
    for child in children:
        if child.process.returncode is not None:
            raise ConfigError(child.reason())


def _all_registered(config: ServeConfig) -> bool:
    expected = config.num_prefill + config.num_decode
    try:
        return len(_get(config, "/admin/workers")["workers"]) == expected
    except OSError:
        return False


def _get(config: ServeConfig, path: str) -> Any:
    url = f"http://{_reachable(config.host)}:{config.port}{path}"
    key = config.admin_key or config.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return json.load(answer)


def _reachable(host: str) -> str:
    """An address that reaches a server listening on ``host`` from this machine."""
    return "127.0.0.1" if ipaddress.ip_address(socket.gethostbyname(host)).is_unspecified else host


async def _watch(children: list[Child], stopping: asyncio.Task[bool], console: Console) -> None:
    """Until asked to stop, or the router ends: say which worker ended; the rest go on."""
    ended = {asyncio.create_task(child.process.wait()): child for child in children}
    while not stopping.done() and ended:
        done, _ = await asyncio.wait({stopping, *ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & ended.keys():
            child = ended.pop(task)
            if child.name == "router":
                raise ConfigError(child.reason())
            if child.process.returncode == 0:
                console.print(f"{child.name} left")
            else:
                console.print(f"[bold red]{child.reason()}[/]")
    for task in ended:
        task.cancel()


async def _stop(children: list[Child]) -> None:
    running = [child for child in children if child.process.returncode is None]
    for child in running:
        child.process.terminate()
    waits = [asyncio.create_task(child.process.wait()) for child in running]
    if waits:
        await asyncio.wait(waits, timeout=STOP_TIMEOUT)
    for child in running:
        if child.process.returncode is None:
            child.process.kill()
            await child.process.wait()


def _print_state(config: ServeConfig, children: list[Child], console: Console) -> None:
    placements = {child.name: child.placement for child in children}
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("worker", "pid", "model", "transport", "KV blocks", "threads", "address"):
        table.add_column(heading, overflow="fold")
    for worker in _get(config, "/admin/workers")["workers"]:
        table.add_row(
            worker["id"],
            str(worker["pid"]),
            Path(worker["model"]).name,
            worker["transport"].rpartition("): ")[2],  # without the library's version and path
            str(worker["load"]["total_blocks"]),
            _threads(placements[worker["id"]]),
            worker["data_address"].partition(";")[0],  # the rest names mapped memory
        )
    console.print(table)
    model = _get(config, "/v1/models")["data"][0]["id"]
    question = {"role": "user", "content": "What does os.path.join do?"}
    body = json.dumps({"model": model, "stream": True, "messages": [question]})
    url = f"http://{_reachable(config.host)}:{config.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key else ""
    how = "" if config.num_prefill else ", colocated: decode workers compute prompts themselves"
    console.print(f"Serving {model} on {url}{how}. Try:\n")
    command = (
        f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )
    console.print(command + "\n", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Both pools, latency and slow requests: {url}/console\n", soft_wrap=True)


def _threads(placement: Placement | None) -> str:
    if placement is None:
        return ""
    cores = ",".join(map(str, sorted(placement.cores or ())))
    return f"{placement.threads} on cores {cores}" if cores else str(placement.threads)
