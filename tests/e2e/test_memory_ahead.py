"""A worker that has served nothing has memory ready for what it will, and no more than that."""

from __future__ import annotations

import psutil

from engine.memory_ahead import AHEAD
from tests.engine.test_memory_ahead import pytestmark as needs_populate
from tests.stack import Stack, eventually

ENOUGH = 60.0  # seconds


@needs_populate
def test_kv_memory_is_there_before_the_first_prompt() -> None:
    with Stack("demo", transport="auto") as stack:  # KV in a file that has a name
        worker = psutil.Process(stack.processes["prefill-0"].pid)

        def resident() -> int:
            maps = worker.memory_maps(grouped=False)
            return sum(part.rss for part in maps if "memfd:kvferry" in part.path)

        assert eventually(lambda: resident() >= 0.9 * AHEAD, ENOUGH), resident()
        assert resident() <= 1.1 * AHEAD
