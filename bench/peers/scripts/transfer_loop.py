"""What the scripts of all transfer engines share: arenas, scattered rows, and the check.

An arena is one registered region of rows. A request copies some rows of the initiator's arena to
other rows of the target's, both scattered as the blocks of a paged cache are. Every word of the
initiator's arena says where it lies, so the target can tell whether the right rows arrived.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TextIO

import numpy
from lines import answer, claim_output

Array = Any  # a numpy array
Ask = Callable[[dict[str, Any]], Any]  # a question to the target process
Transfer = Callable[[dict[str, Any]], float]  # one request of a case; its seconds
WORD = 8  # bytes
WARM_UP = 1  # requests of every case before the clock counts
SOURCE, DESTINATION = 0, 1  # which side's rows


def initiator_arena(num_bytes: int) -> Array:
    """``[words] int64``, each its own index."""
    return numpy.arange(num_bytes // WORD, dtype=numpy.int64)


def target_arena(num_bytes: int) -> Array:
    """``[words] int64`` in memory that is really there."""
    return numpy.full(num_bytes // WORD, -1, numpy.int64)


def rows_of(case: dict[str, Any], num_bytes: int, side: int) -> Array:
    """``[rows] int32``: the rows of a request on one side, distinct, in no order."""
    rows = num_bytes // case["row_bytes"]
    order = numpy.random.default_rng(side).permutation(rows).astype(numpy.int32)
    return order[: case["num_bytes"] // case["row_bytes"]]


def check(arena: Array, case: dict[str, Any]) -> bool:
    """Whether the target's arena holds the case's rows; forgets them for the next case."""
    words = case["row_bytes"] // WORD
    table = arena.reshape(-1, words)
    source, destination = (rows_of(case, arena.nbytes, side) for side in (SOURCE, DESTINATION))
    ends = [0, words - 1]
    expected = source.astype(numpy.int64)[:, None] * words + ends
    right = bool((table[destination][:, ends] == expected).all())
    table[:, ends] = -1
    return right


def run_initiator(
    answers: TextIO, num_bytes: int, about: dict[str, Any], connect: Callable[[Any, Ask], Transfer]
) -> None:
    """Start the target process, then measure cases: GiB/s of each request, one at a time.

    ``connect(hello, ask)`` gets what the target said first and a way to ask it for more.
    """
    target = subprocess.Popen(
        [sys.executable, sys.argv[0], "target", str(num_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    questions, replies = target.stdin, target.stdout
    assert questions is not None
    assert replies is not None

    def ask(question: dict[str, Any]) -> Any:
        print(json.dumps(question), file=questions)
        return json.loads(replies.readline())

    transfer = connect(json.loads(replies.readline()), ask)

    def measure(case: dict[str, Any]) -> list[float]:
        seconds = [transfer(case) for _ in range(WARM_UP + case["repeats"])]
        if not ask({"check": case}):
            raise RuntimeError("the target does not hold what was sent")
        return [case["num_bytes"] / 2**30 / one for one in seconds[WARM_UP:]]

    try:
        answer(answers, about, measure)
    finally:
        target.kill()


def main(target: Callable[[TextIO, int], None], initiator: Callable[[TextIO, int], None]) -> None:
    """The script's two roles: ``initiator BYTES``, which starts ``target BYTES`` itself."""
    role = {"target": target, "initiator": initiator}[sys.argv[1]]
    role(claim_output(), int(sys.argv[2]))
    os._exit(0)  # engines' threads need no tidying
