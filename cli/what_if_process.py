"""The process that simulates: a question of the console a line, an answer a line, JSON both.

It ends when its standard input does, and so with its router, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from planner.fit import observed_profile
from planner.observed import Row
from planner.outcome import Slo
from planner.what_if import answer
from protocol.errors import ConfigError

NICENESS = 10  # serving comes first
SECONDS = 0.5  # of computation for an answer


def main() -> None:
    """Answer until standard input ends."""
    os.nice(NICENESS)
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"answer": _answer(json.loads(line))}
        except ConfigError as error:
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    asked, workers = question["asked"], question["workers"]
    rows = [Row(*row) for row in question["workload"]]
    profile = observed_profile(workers, rows)
    if asked is None:
        return profile.model_dump()
    found = answer(
        rows,
        workers,
        profile,
        pools=(asked["prefill"], asked["decode"]),
        rate_factor=asked["rate_factor"],
        slo=Slo(asked["ttft"], asked["tpot"]),
        seconds=SECONDS,
        local_prefill_tokens=question["local_prefill_tokens"],
    )
    return asdict(found)


if __name__ == "__main__":
    main()
