"""A process that sends blocks of its own arena: ``python -m tests.kvtransfer.sending_worker``.

Arguments: the receiver's address, a grant id, the number of blocks and the bytes of a row. Every
byte of its arena is 0xAB. It sends the whole grant, in memory if the address offers that, prints
how it ended, and waits.
"""

from __future__ import annotations

import queue
import sys

import torch

from kernels.shared_memory import shared_zeros
from kvtransfer.auto import auto_factory
from kvtransfer.config import TransferConfig
from kvtransfer.events import TransferEvent
from kvtransfer.thread import TransferThread

PIECE = 1 << 20  # bytes of a message: many of them, to be killed in between


def main(address: str, grant_id: str, num_blocks: str, row_bytes: str) -> None:
    torch.set_num_threads(1)
    rows = shared_zeros((int(num_blocks), int(row_bytes)), torch.uint8).fill_(0xAB)
    events: queue.Queue[TransferEvent] = queue.Queue()
    config = TransferConfig(in_place_bytes=PIECE)
    thread = TransferThread(rows, auto_factory(rows, "127.0.0.1"), events.put, config=config)
    thread.start()
    blocks = range(int(num_blocks))
    thread.send_blocks(address.encode(), int(grant_id), 0, blocks, blocks)
    print(type(events.get()).__name__, flush=True)
    sys.stdin.read()
    thread.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
