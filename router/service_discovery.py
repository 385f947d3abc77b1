"""Where Prometheus finds the workers' metrics, in the form that its ``http_sd`` reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit


def scrape_targets(workers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group a worker, of rows as ``GET /admin/workers`` gives them."""
    return [
        {
            "targets": [urlsplit(worker["metrics"]).netloc],
            "labels": {"worker": worker["id"], "role": worker["role"]},
        }
        for worker in workers
    ]
