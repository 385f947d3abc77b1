"""A transfer thread's counters for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvtransfer.events import Counters


def transfer_metrics(counters: Counters, description: str) -> Iterator[Metric]:
    """The thread's state now. ``description`` says which transports it may use."""
    for name, text, label, values in (
        (
            "kv_transfer_bytes",
            "Bytes of KV blocks moved",
            "direction",
            {"sent": counters.bytes_sent, "received": counters.bytes_received},
        ),
        (
            "kv_transfer_messages",
            "Messages that carried KV blocks",
            "direction",
            {"sent": counters.messages_sent, "received": counters.messages_received},
        ),
        (
            "kv_transfer_failures",
            "Batches of blocks that were not sent, messages that were not received",
            "reason",
            {"send": counters.failed_sends, "receive": counters.failed_receives},
        ),
        (
            "kv_transfer_refused_messages",
            "Messages that no grant covered; nothing of them was kept",
            "reason",
            dict(counters.refused),
        ),
    ):
        family = CounterMetricFamily(f"kvferry_{name}", text, labels=[label])
        for value, count in values.items():
            family.add_metric([value], count)
        yield family
    yield CounterMetricFamily(
        "kvferry_kv_transfer_strangers",
        "Peers that were hung up on: they did not prove themselves, or broke the protocol",
        value=counters.strangers,
    )
    in_flight = counters.sends_in_flight + counters.receives_in_flight
    yield GaugeMetricFamily("kvferry_kv_transfer_in_flight", "Messages under way", value=in_flight)
    yield GaugeMetricFamily(
        "kvferry_kv_transfer_open_grants",
        "Grants the transport may write under",
        value=counters.open_grants,
    )
    transport = GaugeMetricFamily(
        "kvferry_kv_transfer_transport_info",
        "What connections may use, and what each of them uses",
        labels=["peer", "transport"],
    )
    for peer, lanes in {"any": description, **counters.connections}.items():
        transport.add_metric([peer, lanes], 1)
    yield transport
