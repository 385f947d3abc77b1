"""kvferry's transfer threads between two processes: the whole path, digests of both ends included.

A request lasts from ``send_blocks`` until the sender has ``BlocksSent`` and the receiver every
``BlocksReceived``. Its grant is open before: in a deployment that happens while P computes.
``TRANSPORT`` in the environment is the worker's ``--transport``.
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from typing import Any, TextIO

import torch
from lines import answer
from transfer_loop import (
    DESTINATION,
    SOURCE,
    WORD,
    Ask,
    Transfer,
    check,
    main,
    rows_of,
    run_initiator,
)

from kernels.cpu.memory import private_zeros
from kernels.shared_memory import shared_zeros
from kvtransfer.auto import auto_factory
from kvtransfer.events import BlocksReceived, BlocksSent, GrantClosed
from kvtransfer.thread import TransferThread
from kvtransfer.ucx import UCXTransport

DEADLINE = 60.0  # seconds for any one event
AUTO = os.environ["TRANSPORT"] == "auto"
HOST = "127.0.0.1"


class Worker:
    """One side: an arena of words, and a transfer thread for rows of one size at a time."""

    def __init__(self, arena: torch.Tensor) -> None:
        torch.set_num_threads(1)
        self.arena = arena
        self.events: queue.Queue[Any] = queue.Queue()
        self._thread: TransferThread | None = None
        self._row_bytes = 0

    def thread(self, row_bytes: int) -> TransferThread:
        if self._thread is None or row_bytes != self._row_bytes:
            if self._thread is not None:
                self._thread.stop()
            rows = self.arena.view(-1, row_bytes // self.arena.itemsize)
            factory = auto_factory(rows, HOST) if AUTO else UCXTransport.factory(HOST)
            self._thread = TransferThread(rows, factory, self.events.put)
            self._thread.start()
            self._row_bytes = row_bytes
        return self._thread


def target(answers: TextIO, num_bytes: int) -> None:
    worker = Worker(private_zeros((num_bytes // WORD,), torch.int64).fill_(-1))

    def handle(question: dict[str, Any]) -> Any:
        if "check" in question:
            return check(worker.arena.numpy(), question["check"])
        case, grant = question["case"], question["grant"]
        thread = worker.thread(case["row_bytes"])
        if question["do"] == "open":
            thread.open_grant(grant, blocks(case, num_bytes, DESTINATION))
            return thread.address.decode()
        count = case["num_bytes"] // case["row_bytes"]
        digests = [0] * count
        while count:
            event = worker.events.get(timeout=DEADLINE)
            assert isinstance(event, BlocksReceived), event
            digests[event.first : event.first + len(event.digests)] = event.digests
            count -= len(event.digests)
        end = time.monotonic()
        thread.close_grant(grant)
        assert isinstance(worker.events.get(timeout=DEADLINE), GrantClosed)
        return {"end": end, "digests": digests}

    answer(answers, {}, handle)


def initiator(answers: TextIO, num_bytes: int) -> None:
    zeros = shared_zeros if AUTO else private_zeros  # as prefill has it
    worker = Worker(zeros((num_bytes // WORD,), torch.int64))
    torch.arange(num_bytes // WORD, out=worker.arena)
    grants = itertools.count(1)

    def connect(hello: Any, ask: Ask) -> Transfer:
        def transfer(case: dict[str, Any]) -> float:
            thread = worker.thread(case["row_bytes"])
            grant = next(grants)
            peer = ask({"do": "open", "grant": grant, "case": case}).encode()
            here, there = (blocks(case, num_bytes, side) for side in (SOURCE, DESTINATION))
            start = time.monotonic()
            thread.send_blocks(peer, grant, 0, here, there)
            sent = worker.events.get(timeout=DEADLINE)
            end = time.monotonic()
            assert isinstance(sent, BlocksSent), sent
            received = ask({"do": "await", "grant": grant, "case": case})
            if received["digests"] != sent.digests:
                raise RuntimeError("the digests of the two sides differ")
            return max(end, received["end"]) - start

        return transfer

    run_initiator(answers, num_bytes, {"torch": torch.__version__}, connect)


def blocks(case: dict[str, Any], num_bytes: int, side: int) -> list[int]:
    return rows_of(case, num_bytes, side).tolist()


if __name__ == "__main__":
    main(target, initiator)
