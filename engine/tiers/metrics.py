"""What the tiers hold and do, as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.tiers.cache import TieredCache
from engine.tiers.tier import Tier


class TierCollector(Collector):
    """Reads the present state at every scrape; names carry the prefix ``kvferry_kv_tier_``."""

    def __init__(self, cache: TieredCache, tiers: Sequence[Tier], row_bytes: int) -> None:
        self._cache = cache
        self._tiers = tiers
        self._row_bytes = row_bytes

    def collect(self) -> Iterator[Metric]:
        """Called on the HTTP server's threads."""
        held = GaugeMetricFamily("kvferry_kv_tier_blocks", "KV blocks it holds", labels=["tier"])
        bound = GaugeMetricFamily("kvferry_kv_tier_max_blocks", "and can hold", labels=["tier"])
        evicted = CounterMetricFamily(
            "kvferry_kv_tier_evicted", "KV blocks that made room for others", labels=["tier"]
        )
        moved = CounterMetricFamily(
            "kvferry_kv_tier_bytes", "KV written to a tier and read", labels=["tier", "direction"]
        )
        refused = CounterMetricFamily(
            "kvferry_kv_tier_refused",
            "KV blocks a tier did not take or give",
            labels=["tier", "reason"],
        )
        for tier in self._tiers:
            held.add_metric([tier.name], len(tier.slots))
            bound.add_metric([tier.name], tier.slots.num_slots)
            evicted.add_metric([tier.name], tier.slots.num_evicted)
            moved.add_metric([tier.name, "stored"], tier.counters.stored * self._row_bytes)
            moved.add_metric([tier.name, "loaded"], tier.counters.loaded * self._row_bytes)
            for reason, count in tier.counters.refused.copy().items():
                refused.add_metric([tier.name, reason], count)
        yield from (held, bound, evicted, moved, refused)
        yield from self._of_the_cache()

    def _of_the_cache(self) -> Iterator[Metric]:
        for name, text, value in (
            ("restored", "KV blocks that came back whole", self._cache.num_restored),
            ("lost", "KV blocks that the pool gave up unsaved", self._cache.num_lost),
            ("missed", "KV blocks that hand-offs counted on in vain", self._cache.num_missed),
            ("failed", "KV blocks whose copies to or from a tier raised", self._cache.num_failed),
            ("slow", "KV blocks that were faster to compute", self._cache.num_slow),
            ("save_seconds", "Time spent saving", self._cache.save_seconds),
            ("load_seconds", "Time spent restoring", self._cache.load_seconds),
        ):
            yield CounterMetricFamily(f"kvferry_kv_tier_{name}", text, value=value)
