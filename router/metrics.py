"""What the router measures of its requests, as clients experience them. Times in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from protocol.errors import KvferryError
from router.activity import Activity
from router.generation import GenerationRequest
from router.request_log import Record, RequestLog
from router.shortage import ROLES
from router.timeline import ROUTER_QUEUE
from router.workload_log import WorkloadLog

CLIENT_CLOSED_REQUEST = 499  # nobody receives it; proxies count it under this number
CANCELLED = "cancelled"  # the outcome of a sequence that nobody waits for any more

FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5, 10)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class RouterMetrics:
    """All of the router's series, and what the console shows of the same sequences.

    Names follow vLLM's, with the prefix ``kvferry_``. ``on_end`` is told of every sequence that is
    over.
    """

    def __init__(
        self, registry: CollectorRegistry, on_end: Callable[[Record], None] | None = None
    ) -> None:
        self.on_end = on_end
        self.activity = Activity(time.monotonic())
        self.log = RequestLog()
        self.workload = WorkloadLog()

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
        self.paths = Counter(
            "kvferry_requests_path_total",
            "Attempts begun, by who computes the prompt: remote is prefill, local decode itself",
            ["path"],
            registry=registry,
        )
        self.handoff_seconds = Histogram(
            "kvferry_handoff_seconds",
            "From prefill's token to decode's work on the next",
            registry=registry,
            buckets=FAST,
        )
        self.stale = Counter(
            "kvferry_stale_messages_total",
            "Messages of workers about attempts that are over",
            registry=registry,
        )


class QueueMetrics:
    """What the queue in front of the workers counts; ``depth`` tells how many wait."""

    def __init__(self, registry: CollectorRegistry, depth: Callable[[], int]) -> None:
        self.queue_time = Histogram(
            "kvferry_request_queue_time_seconds",
            "From a request's arrival, or its attempt's failure, to its workers",
            registry=registry,
            buckets=SLOW,
        )
        self.short = Counter(
            "kvferry_queue_short_of_pool_seconds_total",
            "Seconds in which requests waited because no worker of the pool had room",
            ["pool"],
            registry=registry,
        )
        for pool in ROLES:
            self.short.labels(pool=pool)  # 0 until then
        self.shed = Counter(
            "kvferry_requests_shed_total",
            "Requests turned away with 429",
            ["reason"],
            registry=registry,
        )
        waiting = Gauge(
            "kvferry_num_requests_waiting", "Sequences that wait for workers", registry=registry
        )
        waiting.set_function(depth)


class SequenceTimer:
    """One sequence's times, as its client sees them: measured from ``with`` to its end."""

    def __init__(self, metrics: RouterMetrics, request: GenerationRequest) -> None:
        self._metrics = metrics
        self._timeline = request.timeline
        self._record = Record(
            request.request_id,
            len(request.prompt_token_ids),
            request.timeline,
            request.traceparent,
        )

    def __enter__(self) -> Self:
        now = time.monotonic()
        self._timeline.enter(ROUTER_QUEUE, now)
        self._metrics.running.inc()
        self._metrics.log.begin(self._record)
        self._metrics.activity.arrived(now)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        now = time.monotonic()
        reason = self._record.finish_reason
        outcome = reason or _outcome(error)
        self._metrics.running.dec()
        self._metrics.log.end(self._record, outcome, now)
        if outcome != CANCELLED or self._timeline.tokens.count:
            self._metrics.workload.add(self._record)
        if reason is None and outcome != CANCELLED:
            self._metrics.activity.failed(now)
        if self._metrics.on_end is not None:
            self._metrics.on_end(self._record)

    def tokens(self, count: int, num_cached_tokens: int | None = None) -> None:
        """``count`` tokens came together; with the first ones, how much prefill had cached."""
        if count == 0:
            return
        now, last = time.monotonic(), self._timeline.last_token
        self._timeline.deliver(count, now)
        self._metrics.generation_tokens.inc(count)
        gap = None if last is None else (now - last) / count
        self._metrics.activity.tokens(count, gap, now)
        if gap is None:
            seconds, num_prompt_tokens = (
                now - self._timeline.received,
                self._record.num_prompt_tokens,
            )
            self._record.num_cached_tokens = num_cached_tokens
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
            self._metrics.time_to_first_token.observe(seconds)
            self._metrics.activity.first_token(seconds, num_prompt_tokens, now)
        else:
            for _ in range(count):
                self._metrics.inter_token_latency.observe(gap)

    def finished(self, reason: str) -> None:
        """The sequence ended well."""
        self._record.finish_reason = reason
        now, tpot = time.monotonic(), self._timeline.time_per_output_token
        self._metrics.success.labels(finished_reason=reason).inc()
        self._metrics.latency.observe(now - self._timeline.received)
        self._metrics.activity.served(self._timeline.time_to_first_token or 0.0, tpot, now)
        if tpot is not None:
            self._metrics.time_per_output_token.observe(tpot)


def _outcome(error: BaseException | None) -> str:
    """How a sequence ended that did not end well."""
    if isinstance(error, KvferryError):
        return error.code
    return KvferryError.code if isinstance(error, Exception) else CANCELLED
