"""Mooncake's transfer engine between two processes: batched writes over its TCP transport.

Settings: peer-to-peer handshake, so no metadata server; one batch for a request, as its serving
connectors do. The driver raises the bound on queued transfers (a request of more than 1024 rows
is refused otherwise) and gives it eight lanes.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any, TextIO

from lines import answer
from mooncake.engine import TransferEngine
from transfer_loop import (
    DESTINATION,
    SOURCE,
    Array,
    Ask,
    Transfer,
    check,
    initiator_arena,
    main,
    rows_of,
    run_initiator,
    target_arena,
)

HOST = "127.0.0.1"


def start(arena: Array) -> TransferEngine:
    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the engine did not start")
    if engine.register_memory(arena.ctypes.data, arena.nbytes):
        raise RuntimeError("the arena was not registered")
    return engine


def target(answers: TextIO, num_bytes: int) -> None:
    arena = target_arena(num_bytes)
    engine = start(arena)
    hello = {"name": f"{HOST}:{engine.get_rpc_port()}", "address": arena.ctypes.data}
    answer(answers, hello, lambda question: check(arena, question["check"]))


def initiator(answers: TextIO, num_bytes: int) -> None:
    arena = initiator_arena(num_bytes)
    engine = start(arena)

    def connect(hello: Any, ask: Ask) -> Transfer:
        def transfer(case: dict[str, Any]) -> float:
            here, there = (
                (rows_of(case, num_bytes, side).astype("int64") * case["row_bytes"] + base).tolist()
                for side, base in ((SOURCE, arena.ctypes.data), (DESTINATION, hello["address"]))
            )
            lengths = [case["row_bytes"]] * len(here)
            begin = time.perf_counter()
            status = engine.batch_transfer_sync_write(hello["name"], here, there, lengths)
            seconds = time.perf_counter() - begin
            if status:
                raise RuntimeError(f"the request ended with status {status}")
            return seconds

        return transfer

    package = "mooncake-transfer-engine-non-cuda"
    about = {package: importlib.metadata.version(package)}
    run_initiator(answers, num_bytes, about, connect)


if __name__ == "__main__":
    main(target, initiator)
