"""What a decode worker counts that no other role does."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from decode.admission import Admission
from decode.scheduler import DecodeScheduler


def metrics(scheduler: DecodeScheduler, admission: Admission) -> Iterator[Metric]:
    """The present values."""
    yield CounterMetricFamily(
        "kvferry_num_preemptions",
        "Sequences that gave up their blocks to be recomputed",
        value=scheduler.num_preemptions,
    )
    yield CounterMetricFamily(
        "kvferry_kv_grants_expired",
        "Grants that were not handed off in time",
        value=admission.num_expired,
    )
    yield CounterMetricFamily(
        "kvferry_stale_messages",
        "Messages for a former incarnation of this worker or for grants that are over",
        value=admission.num_stale,
    )
    yield GaugeMetricFamily(
        "kvferry_kv_blocks_quarantined",
        "Blocks of ended grants that the transport has not given back yet",
        value=admission.grants.num_quarantined_blocks,
    )
    failures = CounterMetricFamily(
        "kvferry_kv_integrity_failures",
        "Hand-offs whose KV or terms did not verify",
        labels=["reason"],
    )
    for reason, count in admission.integrity_failures.items():
        failures.add_metric([reason], count)
    yield failures
