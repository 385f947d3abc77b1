"""A process that receives into its own arena: ``python -m tests.kvtransfer.receiving_worker``.

Arguments: a grant id, the number of blocks and the bytes of a row. It opens the grant for all its
blocks, prints its address, then a line for every event, and waits.
"""

from __future__ import annotations

import sys

import torch

from kvtransfer.auto import auto_factory
from kvtransfer.thread import TransferThread


def main(grant_id: str, num_blocks: str, row_bytes: str) -> None:
    torch.set_num_threads(1)
    rows = torch.zeros((int(num_blocks), int(row_bytes)), dtype=torch.uint8)
    thread = TransferThread(
        rows, auto_factory(rows, "127.0.0.1"), lambda event: print(event, flush=True)
    )
    thread.start()
    thread.open_grant(int(grant_id), range(int(num_blocks)))
    print(thread.address.decode(), flush=True)
    sys.stdin.read()
    thread.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
