"""A process to be killed: one UCX transport that offers messages or takes them.

    python -m tests.kvtransfer.victim offer ADDRESS TAG BYTES COUNT
    python -m tests.kvtransfer.victim take

It prints its own address and serves until it is killed or its standard input ends; every ended
operation is a line on standard output.
"""

from __future__ import annotations

import select
import sys

import numpy as np

from kvtransfer.ucx import UCXTransport


def main(role: str, *arguments: str) -> None:
    transport = UCXTransport("127.0.0.1")
    print(transport.address.decode(), flush=True)
    operations = []
    if role == "offer":
        address, tag, length, count = arguments
        connection = transport.connect(address.encode())
        buffer = np.full(int(length), 0xAB, np.uint8)
        for i in range(int(count)):
            operations.append(transport.send(connection, int(tag) + i, buffer))
    while not select.select([sys.stdin], [], [], 0)[0]:
        transport.progress()
        if role == "take" and (message := transport.probe()) is not None:
            buffer = np.empty(message.length, np.uint8)
            operations.append(transport.receive(message, buffer))
        for operation in [operation for operation in operations if operation.done]:
            operations.remove(operation)
            print(operation.error or "ok", flush=True)
        transport.wait(0.01)
    transport.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
