"""How processes on one host share its cores, so that they do not fight over them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PIN_FROM = 2  # cores of a worker; with one each, an idle worker's core would be lost to the others


@dataclass(frozen=True, slots=True)
class Placement:
    """What one worker may use."""

    threads: int  # of the engine
    cores: frozenset[int] | None  # it is pinned to; None: it is not


def place(
    cores: Sequence[int], num_workers: int, threads: int | None = None, pin: bool | None = None
) -> list[Placement]:
    """Divide ``cores`` evenly and in order; the first workers get those that are left over.

    ``threads`` of each worker are by default its share of the cores. ``pin`` keeps a worker to its
    share; by default where that is at least ``PIN_FROM``. With fewer cores than workers the shares
    are of one core and overlap.
    """
    whole, left = divmod(len(cores), num_workers)
    placements, start = [], 0
    for index in range(num_workers):
        count = whole + (index < left)
        share = cores[start : start + count] or [cores[index % len(cores)]]
        start += count
        pinned = len(cores) // num_workers >= PIN_FROM if pin is None else pin
        placements.append(Placement(threads or len(share), frozenset(share) if pinned else None))
    return placements


def add_niceness(more: int) -> None:
    """To this process, and so to those that it starts. Raises PermissionError where it may not."""
    os.nice(more)
    # Linux may share cores out among sessions; niceness then counts within this process's only.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(more))
