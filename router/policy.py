"""Which prefill and decode worker serve a request: a pure function over the registry.

Load is what the router itself dispatched beside what the worker reported (other routers may
serve the same pools): a burst between two heartbeats is seen at once.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from protocol.errors import UnavailableError
from router.capacity import (
    Demand,
    free_blocks,
    held_sequences,
    queued_tokens,
    takes_prompt,
    takes_sequence,
)
from router.registry import Registry, Worker


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one request."""

    prefill: Worker
    decode: Worker


def check_serving(registry: Registry) -> None:
    """Raise UnavailableError, naming the pool or field at fault, when no pair serves at all."""
    prefills, decodes = registry.serving("prefill"), registry.serving("decode")
    for name, pool in (("prefill", prefills), ("decode", decodes)):
        if not pool:
            raise UnavailableError(f"no {name} worker is serving")
    if _first_pair(prefills, decodes) is None:
        difference = prefills[0].info.fingerprint.difference(decodes[0].info.fingerprint)
        message = "no prefill and decode workers whose KV fits together"
        raise UnavailableError(f"{message}: {difference}")


def choose_pair(registry: Registry, demand: Demand, avoid: Set[str] = frozenset()) -> Pair | None:
    """The least loaded workers with room for the demand whose KV fits together, or None.

    Workers whose id is in ``avoid`` are taken only where no others have room.
    """
    prefills = [w for w in registry.serving("prefill") if takes_prompt(w)]
    decodes = [w for w in registry.serving("decode") if takes_sequence(w, demand)]
    prefills.sort(key=lambda w: (w.worker_id in avoid, queued_tokens(w)))
    decodes.sort(key=lambda w: (w.worker_id in avoid, held_sequences(w), -free_blocks(w)))
    return _first_pair(prefills, decodes)


def _first_pair(prefills: list[Worker], decodes: list[Worker]) -> Pair | None:
    for prefill in prefills:
        for decode in decodes:
            if prefill.info.fingerprint == decode.info.fingerprint:
                return Pair(prefill, decode)
    return None
