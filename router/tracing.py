"""A span of every sequence, made from its timeline when it is over (OpenTelemetry).

The span carries the attributes of the conventions for generative AI; its children are the stages,
with the worker whose they are. It continues the client's trace where the request has a
``traceparent``. Any other's trace id is the hexadecimal part of the answer's id, so that the
sequences of one answer share it and it can be looked up.

Needs the extra ``kvferry[otel]``: only ``--otlp-endpoint`` imports this module. A thread exports;
what the collector does not take in time is dropped.
"""

from __future__ import annotations

import threading
from typing import Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router.request_log import Record
from router.timeline import Stage

TRACE_ID_DIGITS = 32
CLOSE = 3.0  # seconds to export what is left
OPERATIONS = {"cmpl": "text_completion"}  # by the answer's prefix; all others are chats


class Tracing:
    """Exports the spans of the sequences of one served model."""

    def __init__(self, model: str, exporter: SpanExporter) -> None:
        self._model = model
        self._ids = _TraceIds()
        resource = Resource.create({SERVICE_NAME: "kvferry"})
        self._provider = TracerProvider(
            resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvferry")

    @classmethod
    def to(cls, endpoint: str, model: str) -> Self:
        """Export to a collector, whose address is without the path of its traces."""
        return cls(model, OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"))

    def ended(self, record: Record) -> None:
        """A sequence is over: hand its spans to the exporting thread's queue."""
        times = record.timeline
        assert times.ended is not None
        self._ids.trace_id = int(record.request_id[-TRACE_ID_DIGITS:], 16)
        operation = OPERATIONS.get(record.request_id.partition("-")[0], "chat")
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            TraceContextTextMapPropagator().extract(
                {"traceparent": record.traceparent}, context=Context()
            ),
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, **self._attributes(record)},
            start_time=_nanoseconds(times.received_at),
        )
        if not span.is_recording():  # not sampled
            return
        if record.finish_reason is None:
            assert record.outcome is not None
            span.set_attribute("error.type", record.outcome)
            span.set_status(Status(StatusCode.ERROR, record.outcome))
        around = trace.set_span_in_context(span, Context())
        for stage in times.stages(times.ended):
            self._stage(record, stage, around)
        span.end(_nanoseconds(times.unix(times.ended)))

    def close(self) -> None:
        """Export what is left, for a limited time."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE)

    def _attributes(self, record: Record) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.provider.name": "kvferry",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": record.request_id,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.timeline.tokens.count,
            "kvferry.sequence": record.sequence_id,
            "kvferry.attempts": len(record.timeline.attempts),
        }
        for pool, seconds in record.timeline.waited_for.items():
            attributes[f"kvferry.waited_for.{pool}"] = seconds
        if record.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [record.finish_reason]
        if record.num_cached_tokens is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = record.num_cached_tokens
        if record.timeline.time_to_first_token is not None:
            attributes["kvferry.time_to_first_token"] = record.timeline.time_to_first_token
        return attributes

    def _stage(self, record: Record, stage: Stage, around: Context) -> None:
        times = record.timeline
        worker = times.worker(stage)
        attributes = {} if worker is None else {"kvferry.worker_id": worker}
        span = self._tracer.start_span(
            stage.name,
            around,
            attributes=attributes,
            start_time=_nanoseconds(times.unix(stage.start)),
        )
        span.end(_nanoseconds(times.unix(stage.start + stage.seconds)))


class _TraceIds(RandomIdGenerator):
    """Gives the next trace the id that it was told."""

    trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id


def _nanoseconds(unix: float) -> int:
    return int(unix * 1e9)
