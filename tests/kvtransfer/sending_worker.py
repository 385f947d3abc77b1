"""A process that sends blocks of its own arena: ``python -m tests.kvtransfer.sending_worker``.

Arguments: the receiver's address, a grant id, the number of blocks and the bytes of a row. Every
byte of its arena is 0xAB. It sends the whole grant, prints how that ended, and waits.
"""

from __future__ import annotations

import queue
import sys

import torch

from kvtransfer.events import TransferEvent
from kvtransfer.thread import TransferThread
from kvtransfer.ucx import UCXTransport


def main(address: str, grant_id: str, num_blocks: str, row_bytes: str) -> None:
    torch.set_num_threads(1)
    rows = torch.full((int(num_blocks), int(row_bytes)), 0xAB, dtype=torch.uint8)
    events: queue.Queue[TransferEvent] = queue.Queue()
    thread = TransferThread(rows, UCXTransport.factory("127.0.0.1"), events.put)
    thread.start()
    blocks = range(int(num_blocks))
    thread.send_blocks(address.encode(), int(grant_id), 0, blocks, blocks)
    print(type(events.get()).__name__, flush=True)
    sys.stdin.read()
    thread.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
