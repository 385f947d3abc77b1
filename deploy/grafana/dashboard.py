"""Writes the Grafana dashboard beside this file: ``python deploy/grafana/dashboard.py``.

Rows follow a request: the client's view, the router's queue, prefill, the transfer, decode, and
what went wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("kvferry.json")
WIDTH, HEIGHT, COLUMNS = 8, 7, 3  # of a panel, in Grafana's units; panels in a row
SOURCE = {"type": "prometheus", "uid": "${source}"}
WINDOW = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph: legends and what they show."""

    title: str
    unit: str  # as Grafana names them
    series: dict[str, str]


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A counter's rate per second, summed."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(kvferry_{metric}{{{where}}}[{WINDOW}]))"


def quantile(metric: str, share: float, by: str = "") -> str:
    """A quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    buckets = f"sum by ({labels}) (rate(kvferry_{metric}_bucket[{WINDOW}]))"
    return f"histogram_quantile({share}, {buckets})"


def quantiles(metric: str, *shares: float, by: str = "") -> dict[str, str]:
    """Quantiles of a histogram, by legend."""
    suffix = f" {{{{{by}}}}}" if by else ""
    return {f"p{s * 100:g}{suffix}": quantile(metric, s, by) for s in shares}


ROWS: dict[str, list[Panel]] = {
    "Clients": [
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds", 0.5, 0.9, 0.99)),
        Panel("Between tokens", "s", quantiles("inter_token_latency_seconds", 0.5, 0.9, 0.99)),
        Panel("Whole requests", "s", quantiles("e2e_request_latency_seconds", 0.5, 0.9)),
        Panel(
            "Requests",
            "reqps",
            {
                "{{finished_reason}}": rate("request_success_total", "finished_reason"),
                "error {{status}} {{code}}": rate("http_errors_total", "status, code"),
            },
        ),
        Panel(
            "Tokens",
            "short",
            {
                "prompt": rate("prompt_tokens_total"),
                "generated": rate("generation_tokens_total", where='role="router"'),
            },
        ),
        Panel(
            "Running",
            "short",
            {"sequences": 'sum (kvferry_num_requests_running{role="router"})'},
        ),
    ],
    "The router's queue": [
        Panel(
            "Waiting", "short", {"sequences": 'sum (kvferry_num_requests_waiting{role="router"})'}
        ),
        Panel(
            "No room for the next",
            "percentunit",
            {"{{pool}}": rate("queue_short_of_pool_seconds_total", "pool")},
        ),
        Panel("Turned away", "reqps", {"{{reason}}": rate("requests_shed_total", "reason")}),
    ],
    "Prefill": [
        Panel(
            "Queue and compute",
            "s",
            {
                "queue p90, {{role}}": quantile("request_queue_time_seconds", 0.9, by="role"),
                "compute p90": quantile("request_prefill_time_seconds", 0.9),
            },
        ),
        Panel(
            "Prompt tokens computed",
            "short",
            {"{{worker}}": rate("prompt_tokens_computed_total", "worker")},
        ),
        Panel(
            "Prompts",
            "short",
            {
                "waiting {{worker}}": 'kvferry_num_requests_waiting{role="prefill"}',
                "leases {{worker}}": "kvferry_kv_leases_open",
            },
        ),
    ],
    "Transfer": [
        Panel(
            "KV moved",
            "Bps",
            {"{{worker}}": rate("kv_transfer_bytes_total", "worker", 'direction="sent"')},
        ),
        Panel("A batch of blocks", "s", quantiles("kv_transfer_seconds", 0.5, 0.99)),
        Panel(
            "Grants",
            "short",
            {
                "open {{worker}}": "kvferry_kv_grants_open",
                "expired {{worker}}": rate("kv_grants_expired_total", "worker"),
            },
        ),
    ],
    "Decode": [
        Panel("A step", "s", quantiles("engine_step_seconds", 0.5, 0.99, by="role")),
        Panel(
            "Sequences",
            "short",
            {
                "running {{worker}}": 'kvferry_num_requests_running{role="decode"}',
                "waiting {{worker}}": 'kvferry_num_requests_waiting{role="decode"}',
            },
        ),
        Panel("KV in use", "percentunit", {"{{worker}}": "kvferry_kv_cache_usage_perc"}),
        Panel("Preemptions", "short", {"{{worker}}": rate("num_preemptions_total", "worker")}),
        Panel(
            "Prefix cache hits",
            "percentunit",
            {
                "{{worker}}": rate("prefix_cache_hits_total", "worker")
                + " / "
                + rate("prefix_cache_queries_total", "worker")
            },
        ),
        Panel(
            "Phases of a step",
            "s",
            {"{{role}} {{phase}}": rate("engine_phase_seconds_sum", "role, phase")},
        ),
    ],
    "What went wrong": [
        Panel(
            "Requests gone on elsewhere",
            "short",
            {"{{reason}}": rate("request_retries_total", "reason")},
        ),
        Panel(
            "KV refused",
            "short",
            {
                "{{worker}} {{reason}}": rate("kv_integrity_failures_total", "worker, reason"),
                "message {{worker}} {{reason}}": rate(
                    "kv_transfer_refused_messages_total", "worker, reason"
                ),
                "transfers failed {{worker}}": rate("kv_transfer_failures_total", "worker"),
            },
        ),
        Panel(
            "Held back",
            "short",
            {
                "blocks in quarantine {{worker}}": "kvferry_kv_blocks_quarantined",
                "leases expired {{worker}}": rate("kv_leases_expired_total", "worker"),
                "stale messages {{worker}}": rate("stale_messages_total", "worker"),
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """Everything, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}
        head = {"type": "row", "title": title, "gridPos": place}
        panels.append({**head, "collapsed": False, "panels": []})
        y += 1
        for start in range(0, len(row), COLUMNS):
            for column, panel in enumerate(row[start : start + COLUMNS]):
                panels.append(_graph(panel, column * WIDTH, y))
            y += HEIGHT
    for number, content in enumerate(panels, start=1):
        content["id"] = number
    return {
        "title": "kvferry",
        "uid": "kvferry",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Prometheus",
                }
            ]
        },
        "panels": panels,
    }


def _graph(panel: Panel, x: int, y: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.series.items())
        ],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
