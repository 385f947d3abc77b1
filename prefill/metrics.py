"""What a prefill worker measures of its requests, in seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(slots=True)
class _Times:
    arrived: float
    asked: float | None = None
    granted: float | None = None
    started: float | None = None

    def account(self, now: float) -> dict[str, float]:
        """Where the time went from arrival to the first token: a grant counts while nothing ran."""
        started = self.started or now
        grant = 0.0
        if self.asked is not None and self.granted is not None:
            grant = max(0.0, min(self.granted, started) - self.asked)
        queue = started - self.arrived - grant
        return {"prefill_queue": queue, "grant": grant, "prefill": now - started}


class PrefillMetrics:
    """Histograms per request and per batch of blocks. Forgets a request when it ends."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"kvferry_{name}", text, registry=registry, buckets=BUCKETS)

        self._queue = histogram(
            "request_queue_time_seconds", "From arrival to the first step, the grant included"
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token"
        )
        self._transfer = histogram(
            "kv_transfer_seconds", "From handing a batch of blocks to the transport to its end"
        )
        self._times: dict[str, _Times] = {}
        self._shipped: dict[tuple[int, int], float] = {}

    def arrived(self, request_id: str) -> None:
        """A request joined the queue."""
        self._times[request_id] = _Times(time.perf_counter())

    def asked(self, request_id: str) -> None:
        """Decode is asked for memory."""
        times = self._times.get(request_id)
        if times is not None and times.asked is None:
            times.asked = time.perf_counter()

    def granted(self, request_id: str) -> None:
        """The prompt may be computed to its end."""
        times = self._times.get(request_id)
        if times is not None:
            times.granted = time.perf_counter()

    def started(self, request_id: str) -> None:
        """A request is part of the step that begins now."""
        times = self._times.get(request_id)
        if times is not None and times.started is None:
            times.started = time.perf_counter()
            self._queue.observe(times.started - times.arrived)

    def first_token(self, request_id: str) -> dict[str, float]:
        """A request's prompt is computed; the seconds that each part of it took, in order."""
        times, now = self._times.pop(request_id), time.perf_counter()
        account = times.account(now)
        self._prefill.observe(account["prefill"])
        return account

    def abandoned(self, request_id: str) -> None:
        """A request ended before its first token."""
        self._times.pop(request_id, None)

    def shipping(self, grant_id: int, first: int) -> None:
        """A batch of blocks went to the transport."""
        self._shipped[grant_id, first] = time.perf_counter()

    def shipped(self, grant_id: int, first: int) -> None:
        """The transport is done with a batch of blocks."""
        self._transfer.observe(time.perf_counter() - self._shipped.pop((grant_id, first)))
