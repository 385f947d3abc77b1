"""KV transfers between two processes of one host, through each system's transfer engine.

The KV is Llama-3.1-8B's in bf16: 128 KiB a token (32 layers, 8 KV heads of 128, K and V), in
blocks of 16 tokens, so rows of 2 MiB where a system keeps a block in one piece. Smaller rows are
what layouts with a region for each layer, or smaller models, ask for. kvferry's figures include
the digests of both ends; the others check nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.peers.compare import Measure, Peer
from bench.peers.engines import REPOSITORY, SCRIPTS
from bench.peers.install import Site
from bench.peers.process import running

START_TIMEOUT = 30.0  # seconds
TOKEN_BYTES = 128 << 10
BLOCK_BYTES = 16 * TOKEN_BYTES
SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "256k"}


@dataclass(frozen=True, slots=True)
class Request:
    """The KV of one prompt, in scattered rows on both sides."""

    num_bytes: int
    row_bytes: int
    repeats: int

    def __str__(self) -> str:
        row = self.row_bytes >> 10
        rows = f"{row} KiB" if row < 1024 else f"{row >> 10} MiB"
        return f"{self.num_bytes // TOKEN_BYTES} tokens, {rows} rows"


@dataclass(frozen=True, slots=True)
class Wire:
    """How one row of the table is run."""

    name: str
    script: str
    environment: str | None  # of ``install``; None: kvferry's own
    variables: Mapping[str, str] = field(default_factory=dict)


WIRES = (
    Wire("kvferry, TCP", "transfer_kvferry.py", None, {"UCX_TLS": "tcp", "TRANSPORT": "ucx"}),
    Wire("kvferry, mapped memory", "transfer_kvferry.py", None, {"TRANSPORT": "auto"}),
    Wire("nixl, TCP", "transfer_nixl.py", "nixl", {"UCX_TLS": "tcp", **SEGMENTS}),
    # UCX makes its connections over TCP and moves the data through shared memory
    Wire("nixl, shared memory", "transfer_nixl.py", "nixl", {"UCX_TLS": "shm,tcp,self"}),
    Wire(
        "mooncake, TCP",
        "transfer_mooncake.py",
        "mooncake",
        {
            "MC_TCP_LANES_PER_PEER": "8",
            "MC_TCP_SLICE_SIZE": str(1 << 20),
            "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
            "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
            "MC_TCP_ADMISSION_TIMEOUT_MS": "120000",
        },
    ),
)


def cases(max_tokens: int) -> list[Request]:
    """Prompts of 128 tokens and more in whole blocks, and one of 512 in smaller rows."""
    lengths = [tokens for tokens in (128, 512, 2048, 8192, 32768) if tokens <= max_tokens]
    whole = [
        Request(tokens * TOKEN_BYTES, BLOCK_BYTES, max(2, min(20, 16384 // tokens)))
        for tokens in lengths
    ]
    size = min(512, max_tokens) * TOKEN_BYTES
    return [*whole, Request(size, 128 << 10, 10), Request(size, 16 << 10, 5)]


def peers(site: Site, arena_bytes: int) -> list[Peer]:
    """The transfer engines as rows; each side of a pair holds an arena of so many bytes."""
    return [
        Peer(
            wire.name,
            partial(_start, wire, site, arena_bytes),
            partial(site.require, wire.environment) if wire.environment else lambda: None,
        )
        for wire in WIRES
    ]


@contextlib.contextmanager
def _start(
    wire: Wire, site: Site, arena_bytes: int, bound: float
) -> Iterator[tuple[dict[str, Any], Measure]]:
    python = site.python(wire.environment) if wire.environment else sys.executable
    path = {} if wire.environment else {"PYTHONPATH": str(REPOSITORY)}
    command = [python, str(SCRIPTS / wire.script), "initiator", str(arena_bytes)]
    log = site.logs / f"transfer-{wire.name.replace(', ', '-').replace(' ', '-')}.log"
    with running(command, {**wire.variables, **path}, site.cores, log, answers=True) as process:
        about = process.ask(None, START_TIMEOUT)
        yield about, process.measures("GiB/s", bound)
