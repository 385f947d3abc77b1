"""How late a worker's event loop gets while its transfer thread moves KV.

    python -m bench.event_loop measure --gigabytes 1

Two processes, a thread of transfers beside an event loop in each, as in a worker: every event of
the transfer comes to the loop, which otherwise sleeps a millisecond at a time and notes how much
later it wakes. The same with nothing moving tells what the machine itself costs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

ROW, BLOCKS = 128 << 10, 512  # 64 MiB a batch
NAP = 1e-3  # seconds

app = typer.Typer(add_completion=False)


@app.command()
def measure(
    gigabytes: Annotated[float, typer.Option(help="GiB to move.")] = 1.0,
    transport: Annotated[str, typer.Option(help="As a worker's: auto or ucx.")] = "ucx",
) -> None:
    """Print percentiles of both ends' lag."""
    table = Table(title=f"lag of the event loop while {gigabytes:g} GiB move, ms")
    for column in ("", "p50", "p99", "most", "GiB/s"):
        table.add_column(column)
    for label, batches in (("moving", round(gigabytes * 16)), ("at rest", 0)):
        for end, figures in zip(("receiver", "sender"), _run(transport, batches), strict=True):
            lags = sorted(figures["lags"])
            cells = (statistics.median(lags), lags[int(0.99 * len(lags))], lags[-1])
            rate = batches * ROW * BLOCKS / figures["seconds"] / 2**30
            table.add_row(f"{end}, {label}", *(f"{1e3 * c:.2f}" for c in cells), f"{rate:.2f}")
    Console().print(table)


def _run(transport: str, batches: int) -> list[dict[str, Any]]:
    def start(role: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench.event_loop", "end", role, transport, str(batches)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    receiver = start("receiver")
    assert receiver.stdout is not None
    sender = start("sender", receiver.stdout.readline().strip())
    try:
        assert sender.stdout is not None
        sent = json.loads(sender.stdout.readline())
        received = json.loads(receiver.communicate(timeout=120)[0])
    finally:
        for process in (sender, receiver):
            process.kill()
            process.wait()
    return [received, sent]


@app.command(hidden=True)
def end(
    role: Literal["receiver", "sender"],
    transport: str,
    batches: int,
    address: Annotated[str, typer.Argument()] = "",
) -> None:
    """One of the two processes."""
    asyncio.run(_end(role, transport, batches, address))


async def _end(role: str, transport: str, batches: int, address: str) -> None:
    import torch

    from kernels.cpu.memory import private_zeros
    from kernels.shared_memory import shared_zeros
    from kvtransfer.auto import auto_factory
    from kvtransfer.events import BlocksReceived, BlocksSent
    from kvtransfer.thread import TransferThread
    from kvtransfer.ucx import UCXTransport

    zeros = shared_zeros if transport == "auto" and role == "sender" else private_zeros
    rows = zeros((BLOCKS, ROW // 8), torch.int64)
    torch.arange(rows.numel(), out=rows.view(-1))
    host = "127.0.0.1"
    factory = auto_factory(rows, host) if transport == "auto" else UCXTransport.factory(host)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[object] = asyncio.Queue()

    def tell(event: object) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    thread = TransferThread(rows, factory, tell)
    thread.start()
    lags: list[float] = []
    napping = asyncio.create_task(_nap(lags))
    begun = time.monotonic()
    if role == "receiver":
        for grant in range(1, batches + 1):
            thread.open_grant(grant, range(BLOCKS))
        print(thread.address.decode(), flush=True)
        missing = batches * BLOCKS
        while missing:
            event = await events.get()
            missing -= len(event.digests) if isinstance(event, BlocksReceived) else 0
    for grant in range(1, batches + 1) if role == "sender" else ():
        thread.send_blocks(address.encode(), grant, 0, range(BLOCKS), range(BLOCKS))
        assert isinstance(await events.get(), BlocksSent)
    if not batches:
        await asyncio.sleep(1.0)
    seconds = time.monotonic() - begun
    napping.cancel()
    print(json.dumps({"lags": lags, "seconds": seconds}), flush=True)
    if role == "sender":
        sys.stdin.read()  # what the peer has not yet taken would be lost with this process
    thread.stop()


async def _nap(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(NAP)
        lags.append(time.perf_counter() - before - NAP)


if __name__ == "__main__":
    app()
