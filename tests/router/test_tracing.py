"""Spans of ended sequences, in memory and on their way to a collector."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from cli.router import RouterConfig, serve_router
from protocol.errors import ConfigError
from router.request_log import Record
from router.timeline import Timeline
from router.tracing import CLOSE, Tracing
from tests.collector import Collector
from tests.router.conftest import MODEL, PATIENCE

HEX = "00112233445566778899aabbccddeeff"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ended(traceparent: str = "", number: int = 0, reason: str | None = "stop") -> Record:
    timeline = Timeline.begun(received=10.0, read=10.5)
    timeline.waited_for["decode"] = 0.5
    timeline.enter("prefill", 11.0)
    timeline.attempts.append(("p0", "d0"))
    timeline.enter("decode", 12.0)
    timeline.deliver(1, 12.5)
    timeline.end(14.0)
    return Record(
        f"cmpl-{HEX}-{number}",
        num_prompt_tokens=7,
        timeline=timeline,
        traceparent=traceparent,
        num_cached_tokens=3,
        finish_reason=reason,
        outcome=reason or "deadline_exceeded",
    )


def spans(*records: Record) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """Those of sequences and those of stages."""
    exporter = InMemorySpanExporter()
    tracing = Tracing("m", exporter)
    for record in records:
        tracing.ended(record)
    tracing.close()
    made = exporter.get_finished_spans()
    kinds = (SpanKind.SERVER, SpanKind.INTERNAL)
    roots, stages = ([span for span in made if span.kind is kind] for kind in kinds)
    return roots, stages


def test_a_sequence_and_its_stages() -> None:
    record = ended()
    [root], stages = spans(record)
    assert root.name == "text_completion m"
    assert root.parent is None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == HEX
    assert root.start_time == pytest.approx(record.timeline.received_at * 1e9, abs=1e6)
    assert root.end_time == pytest.approx(root.start_time + 4e9, abs=1e6)
    assert root.attributes is not None
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "kvferry",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": f"cmpl-{HEX}",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 1,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "kvferry.sequence": f"cmpl-{HEX}-0",
        "kvferry.attempts": 1,
        "kvferry.waited_for.decode": 0.5,
        "kvferry.time_to_first_token": 2.5,
    }
    told = [(span.name, (span.attributes or {}).get("kvferry.worker_id")) for span in stages]
    assert told == [
        ("receive", None),
        ("tokenise", None),
        ("prefill", "p0"),
        ("deliver", None),
        ("decode", "d0"),
    ]
    assert {span.parent and span.parent.span_id for span in stages} == {root.context.span_id}
    ends = [span.end_time for span in stages]
    assert [span.start_time for span in stages] == [root.start_time, *ends[:-1]]  # without a gap


def test_the_clients_trace_is_continued() -> None:
    [root], stages = spans(ended(PARENT))
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    traces = {span.context.trace_id for span in (root, *stages) if span.context}
    assert [f"{trace:032x}" for trace in traces] == ["0af7651916cd43dd8448eb211c80319c"]


@pytest.mark.parametrize("traceparent", ["nonsense", PARENT[:-3], "00-" + 32 * "0" + PARENT[35:]])
def test_what_is_no_trace_context_is_ignored(traceparent: str) -> None:
    [root], _ = spans(ended(traceparent))
    assert root.parent is None


def test_a_client_that_does_not_sample_gets_no_spans() -> None:
    assert spans(ended(PARENT[:-2] + "00")) == ([], [])


def test_the_sequences_of_an_answer_share_its_trace() -> None:
    roots, _ = spans(ended(), ended(number=1))
    assert [f"{root.context.trace_id:032x}" for root in roots if root.context] == [HEX, HEX]


def test_an_error_is_one_in_the_trace() -> None:
    [root], _ = spans(ended(reason=None))
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes is not None
    assert root.attributes["error.type"] == "deadline_exceeded"
    assert "gen_ai.response.finish_reasons" not in root.attributes


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def test_spans_reach_a_collector(collector: Collector) -> None:
    tracing = Tracing.to(collector.url + "/", "m")
    tracing.ended(ended())
    tracing.close()
    names = [span.name for span in collector.spans]
    assert sorted(names) == sorted(
        ["text_completion m", "receive", "tokenise", "prefill", "deliver", "decode"]
    )


def test_a_collector_that_does_not_answer_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds a batch
    others = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracing = Tracing.to(f"http://127.0.0.1:{deaf.getsockname()[1]}", "m")
        started = time.monotonic()
        for _ in range(500):  # more spans than the queue holds
            tracing.ended(ended())
        tracing.close()
        assert time.monotonic() - started < CLOSE + PATIENCE
    # What still exports ends here: its retries draw random numbers, beside any later test's.
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE)
        assert not thread.is_alive()


async def test_an_endpoint_that_is_none_is_refused() -> None:
    config = RouterConfig(
        str(MODEL), "m", "127.0.0.1", 0, "ipc:///nowhere/s", otlp_endpoint="localhost:4318"
    )
    with pytest.raises(ConfigError, match="--otlp-endpoint localhost:4318 is no http"):
        await serve_router(config)


async def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "router.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    config = RouterConfig(
        str(MODEL), "m", "127.0.0.1", 0, "ipc:///nowhere/s", otlp_endpoint="http://localhost"
    )
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[otel\]'"):
        await serve_router(config)
