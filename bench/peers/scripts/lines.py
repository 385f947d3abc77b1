"""How a script talks with the driver: a case a line in, an answer a line out, both JSON.

Every script here is run by its own peer's interpreter, so this file imports nothing but the
standard library. Whatever a peer itself prints goes to the script's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def claim_output() -> TextIO:
    """The stream for answers; from now on the process's own output is its log's."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, about: dict[str, Any], handle: Callable[[dict[str, Any]], Any]) -> None:
    """Say what was loaded (versions, settings), then answer every line until input ends."""
    print(json.dumps(about), file=answers)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(handle(json.loads(line))), file=answers)
