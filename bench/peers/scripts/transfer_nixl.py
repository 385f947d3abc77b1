"""NIXL between two processes: DRAM to DRAM writes over its UCX backend.

Settings: descriptors of the whole arena prepared once, a request made of indices, as vLLM's
connector does. The target has a progress thread, which TCP needs; the initiator makes progress
while it asks whether the request is done, so that each side keeps one core busy.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import time
from typing import Any, TextIO

import numpy
from lines import answer
from nixl._api import nixl_agent, nixl_agent_config
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


def target(answers: TextIO, num_bytes: int) -> None:
    agent = nixl_agent("target", nixl_agent_config(enable_prog_thread=True))
    arena = target_arena(num_bytes)
    agent.register_memory([(arena.ctypes.data, arena.nbytes, 0, "")], "DRAM")
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    hello = {"metadata": metadata, "address": arena.ctypes.data}
    answer(answers, hello, lambda question: check(arena, question["check"]))


def initiator(answers: TextIO, num_bytes: int) -> None:
    agent = nixl_agent("initiator", nixl_agent_config(enable_prog_thread=False))
    arena = initiator_arena(num_bytes)
    agent.register_memory([(arena.ctypes.data, arena.nbytes, 0, "")], "DRAM")

    def connect(hello: Any, ask: Ask) -> Transfer:
        peer = agent.add_remote_agent(base64.b64decode(hello["metadata"]))
        prepared: dict[int, tuple[Any, Any]] = {}

        def transfer(case: dict[str, Any]) -> float:
            size = case["row_bytes"]
            if size not in prepared:
                prepared[size] = (
                    prepare("NIXL_INIT_AGENT", arena.ctypes.data, size),
                    prepare(peer, hello["address"], size),
                )
            local, remote = prepared[size]
            here, there = (rows_of(case, num_bytes, side) for side in (SOURCE, DESTINATION))
            start = time.perf_counter()
            request = agent.make_prepped_xfer("WRITE", local, here, remote, there, b"done")
            state = agent.transfer(request)
            while state == "PROC":
                state = agent.check_xfer_state(request)
            seconds = time.perf_counter() - start
            if state != "DONE":
                raise RuntimeError(f"the request ended as {state}")
            agent.release_xfer_handle(request)
            return seconds

        return transfer

    def prepare(peer: str, address: int, row_bytes: int) -> Any:
        return agent.prep_xfer_dlist(peer, descriptors(address, num_bytes, row_bytes), "DRAM")

    about = {"nixl": importlib.metadata.version("nixl"), "UCX_TLS": os.environ["UCX_TLS"]}
    run_initiator(answers, num_bytes, about, connect)


def descriptors(address: int, num_bytes: int, row_bytes: int) -> Array:
    """``[rows, 3] int64``: address, bytes, device."""
    starts = address + numpy.arange(num_bytes // row_bytes, dtype=numpy.int64) * row_bytes
    return numpy.stack([starts, numpy.full_like(starts, row_bytes), starts * 0], axis=1)


if __name__ == "__main__":
    main(target, initiator)
