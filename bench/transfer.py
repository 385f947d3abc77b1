"""How fast blocks move between two processes, against UCX's own ucx_perftest on the same wire.

    python bench/transfer.py --repeats 5

Ours is the whole path: from ``send_blocks`` on one transfer thread to ``BlocksReceived`` on the
other, cutting, staging and the digests of both ends included, and the digests compared; over UCX,
and over mapped memory as between workers of one host, which UCX's settings do not touch. Theirs
is tag_bw between two buffers. Each runs with UCX's own TCP segment sizes and with kvferry's, and
theirs with and without the peer error handling that ours cannot do without. Each end has a core of
its own. One repeat runs every case once, in turn, so that a busy machine is busy for all of them;
figures are medians.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import libucx
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:  # torch comes where it is needed: the driver must not load it
    from kvtransfer.thread import TransferThread

PERFTEST = Path(libucx.__file__).parent / "bin" / "ucx_perftest"
WARM_UP = 2  # transfers before the clock starts
SEGMENTS = {
    "default": {"UCX_TCP_TX_SEG_SIZE": "8k", "UCX_TCP_RX_SEG_SIZE": "64k"},  # UCX's own
    "tuned": {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "1m"},
}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Ours:
    """Grants of ``num_bytes``, two under way at a time."""

    num_bytes: int
    row_bytes: int
    scattered: bool
    transport: str = "ucx"  # or auto, which is mapped memory here

    def __str__(self) -> str:
        layout = "scattered" if self.scattered else "adjacent"
        wire = "" if self.transport == "ucx" else ", mapped memory"
        return f"kvferry, rows of {self.row_bytes >> 10} KiB, {layout}{wire}"

    def measure(self, tls: str, segments: str, transfers: int) -> float:
        """GiB/s."""
        environment = {"UCX_TLS": tls, **SEGMENTS[segments]}
        shape = [str(self.num_bytes), str(self.row_bytes), str(transfers)]
        shape += ["scattered" if self.scattered else "adjacent", self.transport]
        with _process(["receive", *shape], environment, core=0) as receiver:
            assert receiver.stdout is not None
            address = receiver.stdout.readline().strip()
            with _process(["send", *shape, address], environment, core=1) as sender:
                assert sender.stdout is not None
                sent = json.loads(sender.stdout.readline())
                received = json.loads(receiver.communicate(timeout=120)[0])
        assert sent["digests"] == received["digests"], "KV was damaged on the way"
        seconds = max(sent["end"], received["end"]) - sent["start"]
        return float(self.num_bytes * transfers / seconds / 2**30)


@dataclass(frozen=True, slots=True)
class Theirs:
    """ucx_perftest's tag_bw with messages of ``num_bytes``."""

    num_bytes: int
    error_handling: bool

    def __str__(self) -> str:
        handling = "with" if self.error_handling else "no"
        return f"ucx_perftest, {handling} error handling"

    def measure(self, tls: str, segments: str, transfers: int) -> float:
        """GiB/s."""
        library = str(PERFTEST.parent.parent / "lib")
        quiet = {"UCX_WARN_UNUSED_ENV_VARS": "n", "LD_LIBRARY_PATH": library}
        environment = {**os.environ, "UCX_TLS": tls, **SEGMENTS[segments], **quiet}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [str(PERFTEST), "-p", port, "-m", "host"]
        test = ["-t", "tag_bw", "-s", str(self.num_bytes), "-f"]
        test += ["-n", str(transfers), "-w", str(WARM_UP)] + ["-e"] * self.error_handling
        server = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=_on_core(0)
        )
        try:
            for _ in range(100):
                time.sleep(0.1)
                client = subprocess.run(
                    [*command, "127.0.0.1", *test],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=120,
                    preexec_fn=_on_core(1),
                )
                if client.returncode == 0:
                    break
            client.check_returncode()
        finally:
            server.kill()
            server.wait()
        # the last line: iterations, three latencies, and bandwidth in MiB/s, average and overall
        return float(client.stdout.strip().splitlines()[-1].split()[-3]) / 1024


@app.command()
def compare(
    megabytes: Annotated[int, typer.Option(help="MiB of one transfer")] = 64,
    transfers: Annotated[int, typer.Option(help="Transfers in one run")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of every case")] = 5,
    tls: Annotated[str, typer.Option(help="UCX_TLS of both")] = "tcp",
    out: Annotated[Path, typer.Option(help="Where the JSON goes")] = Path("bench/results"),
) -> None:
    """Run every case and print medians."""
    size = megabytes << 20
    cases: list[Ours | Theirs] = [
        Ours(size, 128 << 10, scattered=False),
        Ours(size, 128 << 10, scattered=True),
        Ours(size, 1 << 20, scattered=True),
        Ours(size, 8 << 10, scattered=True),
        Ours(size, 16 << 10, scattered=True, transport="auto"),
        Ours(size, 128 << 10, scattered=True, transport="auto"),
        Ours(size, 1 << 20, scattered=True, transport="auto"),
        Theirs(size, error_handling=True),
        Theirs(size, error_handling=False),
    ]
    runs: dict[tuple[str, str], list[float]] = {
        (str(case), segments): [] for case in cases for segments in SEGMENTS
    }
    schedule = [(case, segments) for case in cases for segments in SEGMENTS] * repeats
    for case, segments in track(schedule, "measuring"):
        runs[str(case), segments].append(case.measure(tls, segments, transfers))
    medians = {key: statistics.median(values) for key, values in runs.items()}
    best = {str(case): max(medians[str(case), segments] for segments in SEGMENTS) for case in cases}
    table = Table(title=f"{megabytes} MiB transfers over {tls}, GiB/s, median of {repeats}")
    for column in ("", *SEGMENTS, "of perftest", "of perftest, no error handling"):
        table.add_column(column)
    for case in cases:
        name = str(case)
        shares = [f"{best[name] / best[str(theirs)]:.2f}" for theirs in cases[-2:]]
        table.add_row(name, *(f"{medians[name, s]:.2f}" for s in SEGMENTS), *shares)
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"transfer-{tls}-{megabytes}MiB.json"
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.release()}",
        "load_average_at_end": os.getloadavg(),
        "libucx": libucx.__version__,
        "unit": "GiB/s",
        "transfer_bytes": size,
        "transfers": transfers,
        "runs": {" | ".join(key): values for key, values in runs.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    Console().print(f"wrote {path}")


@app.command(hidden=True)
def receive(num_bytes: int, row_bytes: int, transfers: int, order: str, transport: str) -> None:
    """One process of ours: print an address, then receive every grant."""
    with _worker(num_bytes, row_bytes, transport, shared=False) as (thread, events):
        blocks = _blocks(num_bytes, row_bytes, order, seed=1)
        for transfer in range(WARM_UP + transfers):
            thread.open_grant(transfer + 1, blocks[transfer % 2])
        print(thread.address.decode(), flush=True)
        got = {transfer + 1: 0 for transfer in range(WARM_UP + transfers)}
        digests = [0] * len(blocks[0])
        while min(got.values()) < len(blocks[0]):
            event = events.get(timeout=60)
            got[event.grant_id] += len(event.digests)
            digests[event.first : event.first + len(event.digests)] = event.digests
        print(json.dumps({"end": time.monotonic(), "digests": digests}))


@app.command(hidden=True)
def send(
    num_bytes: int, row_bytes: int, transfers: int, order: str, transport: str, address: str
) -> None:
    """The other process of ours: send every grant, two at a time."""
    shared = transport == "auto"
    with _worker(num_bytes, row_bytes, transport, shared=shared) as (thread, events):
        source = _blocks(num_bytes, row_bytes, order, seed=0)[0]
        destinations = _blocks(num_bytes, row_bytes, order, seed=1)

        def post(transfer: int) -> None:
            where = destinations[transfer % 2]
            thread.send_blocks(address.encode(), transfer + 1, 0, source, where)

        for transfer in range(WARM_UP):
            post(transfer)
            events.get(timeout=60)
        start = time.monotonic()
        for transfer in range(WARM_UP, WARM_UP + transfers):
            post(transfer)
            if transfer > WARM_UP:
                events.get(timeout=60)
        digests = events.get(timeout=60).digests
        print(json.dumps({"start": start, "end": time.monotonic(), "digests": digests}), flush=True)
        sys.stdin.read()  # what the peer has not yet taken would be lost with this process


def _blocks(num_bytes: int, row_bytes: int, order: str, seed: int) -> tuple[list[int], list[int]]:
    """Two halves of an arena, each the blocks of one transfer."""
    count = num_bytes // row_bytes
    halves = list(range(count)), list(range(count, 2 * count))
    if order == "scattered":
        for half in halves:
            random.Random(seed).shuffle(half)
    return halves


@contextmanager
def _worker(
    num_bytes: int, row_bytes: int, transport: str, *, shared: bool
) -> Iterator[tuple[TransferThread, queue.Queue[Any]]]:
    import torch

    from kernels.cpu.memory import private_zeros
    from kernels.shared_memory import shared_zeros
    from kvtransfer.auto import auto_factory
    from kvtransfer.thread import TransferThread
    from kvtransfer.ucx import UCXTransport

    torch.set_num_threads(1)
    zeros = shared_zeros if shared else private_zeros  # as a worker in this place has them
    rows = zeros((2 * num_bytes // row_bytes, row_bytes // 8), torch.int64)
    torch.arange(rows.numel(), out=rows.view(-1))
    host = "127.0.0.1"
    factory = UCXTransport.factory(host) if transport == "ucx" else auto_factory(rows, host)
    events: queue.Queue[Any] = queue.Queue()
    thread = TransferThread(rows, factory, events.put)
    thread.start()
    yield thread, events
    thread.stop()


def _on_core(number: int) -> Callable[[], None]:
    """Keeps a process to one core: else a scheduler may put both ends on the same one."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[number % len(cores)]
    return lambda: os.sched_setaffinity(0, {core})


@contextmanager
def _process(
    arguments: list[str], environment: dict[str, str], core: int
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": f".:{os.environ.get('PYTHONPATH', '')}", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_on_core(core),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    app()
