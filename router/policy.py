"""Which prefill and decode worker serve a request: a pure function over the registry.

Load is what the router itself dispatched, or what the worker reported if that is more (other
routers may serve the same pools): a burst between two heartbeats is seen at once.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from protocol.errors import UnavailableError
from router.registry import Registry, Worker


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one request."""

    prefill: Worker
    decode: Worker


def prefill_load(worker: Worker) -> int:
    """Tokens queued."""
    return max(worker.assigned_tokens, worker.load.waiting_tokens)


def decode_load(worker: Worker) -> tuple[int, int]:
    """Sequences held, then KV blocks in use."""
    reported = worker.load.num_running + worker.load.num_waiting + worker.load.open_grants
    used_blocks = worker.load.total_blocks - worker.load.free_blocks
    return max(len(worker.assigned), reported), used_blocks


def choose_pair(registry: Registry, avoid: Set[str] = frozenset()) -> Pair:
    """The least loaded prefill worker and the least loaded decode worker whose KV fits together.

    Workers whose id is in ``avoid`` are taken only where there are no others. Raises
    UnavailableError when there is no such pair, naming the pool or field at fault.
    """
    prefills = registry.serving("prefill")
    decodes = registry.serving("decode")
    prefills.sort(key=lambda worker: (worker.worker_id in avoid, prefill_load(worker)))
    decodes.sort(key=lambda worker: (worker.worker_id in avoid, decode_load(worker)))
    for name, pool in (("prefill", prefills), ("decode", decodes)):
        if not pool:
            raise UnavailableError(f"no {name} worker is serving")
    difference: str | None = None
    for prefill in prefills:
        for decode in decodes:
            difference = prefill.info.fingerprint.difference(decode.info.fingerprint)
            if difference is None:
                return Pair(prefill, decode)
    raise UnavailableError(f"no prefill and decode workers whose KV fits together: {difference}")
