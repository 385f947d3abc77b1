"""Keeps what the router knows of the workers' caches, and measures how true it is."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from protocol.link import Server
from protocol.messages import CacheChanges, FirstToken, SendCache
from router.registry import Registry
from router.running import Running


class CacheDirectory:
    """Takes what the workers of ``registry`` tell of their caches."""

    def __init__(self, registry: Registry, link: Server, metrics: CollectorRegistry) -> None:
        self._registry = registry
        self._link = link

        def counter(name: str, text: str) -> Counter:
            return Counter(f"kvferry_router_{name}_total", text, registry=metrics)

        self._resyncs = counter("cache_resyncs", "Changes of caches missed, all asked for again")
        self._predicted = counter(
            "predicted_cached_tokens", "Tokens that requests were expected to find cached"
        )
        self._found = counter("found_cached_tokens", "Tokens that the same requests found cached")
        blocks = Gauge(
            "kvferry_router_cached_blocks",
            "Cached blocks of all workers that the router knows",
            registry=metrics,
        )
        blocks.set_function(lambda: sum(len(w.cached.keys) for w in registry.all()))

    def handle(self, peer: bytes, message: CacheChanges) -> None:
        """Take a worker's message; ask for everything if one is missing."""
        worker = self._registry.get(peer)
        if worker is not None and not worker.cached.apply(message):
            self._resyncs.inc()
            self._link.send(peer, SendCache())

    def prompt_computed(self, running: Running, first: FirstToken) -> None:
        """The first token of the present attempt tells what its worker has really found."""
        assert running.pair is not None
        computes = running.pair.prefill or running.pair.decode
        assignment = computes.assigned.get(first.request_id)
        if assignment is not None:
            self._predicted.inc(assignment.num_tokens - assignment.prompt_tokens)
            self._found.inc(first.num_cached_tokens)
        if first.finish_reason is None:  # the KV is on its way to decode
            decode = running.pair.decode
            decode.cached.expect(running.prompt(decode.info.fingerprint))

    def output_computed(self, running: Running) -> None:
        """The present attempt is over on its decode worker, which keeps what it has computed."""
        assert running.pair is not None
        decode, output = running.pair.decode, running.lifecycle.token_ids
        decode.cached.expect(running.prompt.continued(decode.info.fingerprint, output))
