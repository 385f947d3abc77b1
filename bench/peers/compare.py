"""The loop that all three comparisons share: every peer, every case, one failure harming none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bench.peers.record import Figures, Record


class PeerError(Exception):
    """A peer did not start, did not answer in time, or ended."""


Measure = Callable[[Any], tuple[Figures, Any]]  # a case -> its figures, and what they come from


@dataclass(frozen=True, slots=True)
class Peer:
    """One row of the table.

    ``start(bound)`` gives what the peer says of itself (versions, settings) and its measure, which
    has ``bound`` seconds from then on. ``prepare`` comes first. All raise PeerError.
    """

    name: str
    start: Callable[[float], AbstractContextManager[tuple[dict[str, Any], Measure]]]
    prepare: Callable[[], None] = lambda: None


def compare(
    peers: Sequence[Peer],
    cases: Sequence[Any],
    record: Record,
    bound: float,
    console: Console,
    rounds: int = 1,
) -> None:
    """Measure what the record lacks, peer after peer, each for ``bound`` seconds at most.

    All of that in ``rounds`` rounds, so that a machine's slow minutes are not one peer's.
    """
    for number, peer in itertools.product(range(rounds), peers):
        missing = [case for case in cases if record.num_rounds(peer.name, str(case)) <= number]
        if not missing:
            continue
        console.print(f"[bold]{peer.name}[/]")
        try:
            peer.prepare()
            with peer.start(bound) as (about, measure):
                record.describe(peer.name, about)
                while missing:
                    case = missing[0]
                    figures, runs = measure(case)
                    record.put(peer.name, str(case), figures, runs)
                    missing.pop(0)
                    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                    console.print(f"  {case}: {said}", highlight=False)
        except PeerError as error:
            console.print(f"  [red]{error}[/]", highlight=False)
            for case in missing:
                record.fail(peer.name, str(case), str(error))
