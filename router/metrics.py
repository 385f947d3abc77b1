"""What the router measures of its requests, as clients experience them. Times in seconds."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CLIENT_CLOSED_REQUEST = 499  # nobody receives it; proxies count it under this number

FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5, 10)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class RouterMetrics:
    """All of the router's series. Names follow vLLM's, with the prefix ``kvferry_``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvferry_{name}", text, registry=registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvferry_{name}", text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", SLOW
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between a sequence's tokens", FAST
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean of a sequence's tokens but the first",
            FAST,
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end", SLOW
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts that were computed")
        self.generation_tokens = counter("generation_tokens_total", "Tokens delivered")
        self.success = counter(
            "request_success_total", "Sequences that ended well", "finished_reason"
        )
        self.errors = counter("http_errors_total", "Errors told to clients", "status", "code")
        self.running = Gauge(
            "kvferry_num_requests_running", "Sequences between dispatch and end", registry=registry
        )

    def failed(self, status: int, code: str) -> None:
        """A client was told of an error, in an answer or in a stream."""
        self.errors.labels(status=str(status), code=code).inc()

    def client_left(self) -> None:
        """A client went away before its answer was complete."""
        self.failed(CLIENT_CLOSED_REQUEST, "client_closed_request")


class DispatchMetrics:
    """What the dispatcher counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.retries = Counter(
            "kvferry_request_retries_total",
            "Attempts given up and begun anew on other workers",
            ["reason"],
            registry=registry,
        )
        self.stale = Counter(
            "kvferry_stale_messages_total",
            "Messages of workers about attempts that are over",
            registry=registry,
        )


class SequenceTimer:
    """One sequence's times, from the arrival of its request."""

    def __init__(self, metrics: RouterMetrics, arrived: float, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._arrived = arrived  # time.perf_counter()
        self._first = self._last = arrived
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0

    def tokens(self, count: int) -> None:
        """``count`` tokens came together."""
        if count == 0:
            return
        now = time.perf_counter()
        self._metrics.generation_tokens.inc(count)
        if self._num_tokens == 0:
            self._first = now
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._metrics.time_to_first_token.observe(now - self._arrived)
        else:
            for _ in range(count):
                self._metrics.inter_token_latency.observe((now - self._last) / count)
        self._num_tokens += count
        self._last = now

    def finished(self, reason: str) -> None:
        """The sequence ended well."""
        self._metrics.success.labels(finished_reason=reason).inc()
        self._metrics.latency.observe(time.perf_counter() - self._arrived)
        if self._num_tokens > 1:
            mean = (self._last - self._first) / (self._num_tokens - 1)
            self._metrics.time_per_output_token.observe(mean)
