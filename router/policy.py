"""Which prefill and decode worker serve a request: a pure function over the registry.

Load is what the router itself dispatched, or what the worker reported if that is more (other
routers may serve the same pools): a burst between two heartbeats is seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import UnavailableError
from router.registry import Registry, Worker


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one request."""

    prefill: Worker
    decode: Worker


def prefill_load(worker: Worker) -> int:
    """Prompt tokens queued."""
    return max(worker.assigned_tokens, worker.load.waiting_tokens)


def decode_load(worker: Worker) -> tuple[int, int]:
    """Sequences held, then KV blocks in use."""
    reported = worker.load.num_running + worker.load.num_waiting + worker.load.open_grants
    used_blocks = worker.load.total_blocks - worker.load.free_blocks
    return max(len(worker.assigned), reported), used_blocks


def choose_pair(registry: Registry) -> Pair:
    """The least loaded prefill worker and the least loaded decode worker whose KV fits together.

    Raises UnavailableError when there is no such pair, naming the pool or field at fault.
    """
    prefills = sorted(registry.serving("prefill"), key=prefill_load)
    decodes = sorted(registry.serving("decode"), key=decode_load)
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
