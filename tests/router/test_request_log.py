"""The log of requests: how each sequence ended, the line that tells of it, and what is kept."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client import CollectorRegistry

from protocol.errors import DeadlineError, RequestNotFoundError
from protocol.sampling import SamplingParams
from router.activity import Objective
from router.generation import GenerationRequest
from router.metrics import RouterMetrics, SequenceTimer
from router.request_log import MAX_RECENT, SLOW_PER_MINUTE, Record, RequestLog
from router.timeline import Timeline

GOAL = Objective(time_to_first_token=1.0, time_per_output_token=0.1)


def timed(metrics: RouterMetrics, error: BaseException | None) -> Record:
    request = GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=9))
    with SequenceTimer(metrics, request) as timer:
        [record] = metrics.log.running(9)
        assert (record.outcome, record.timeline.stage) == (None, "router_queue")
        if error is not None:
            raise error
        timer.tokens(2, num_cached_tokens=1)
        timer.finished("stop")
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("error", "outcome", "failed"),
    [
        (DeadlineError("late"), "deadline_exceeded", 1),
        (RuntimeError("a bug"), "internal_error", 1),
        (asyncio.CancelledError(), "cancelled", 0),
        (GeneratorExit(), "cancelled", 0),
    ],
)
def test_how_a_sequence_ended(error: BaseException, outcome: str, failed: int) -> None:
    metrics = RouterMetrics(CollectorRegistry())
    with pytest.raises(type(error)):
        timed(metrics, error)
    assert [record.outcome for record in metrics.log.recent(9)] == [outcome]
    assert metrics.log.running(9) == []
    now = metrics.log.recent(1)[0].timeline.received
    rates = metrics.activity.present(GOAL, now)["rates"]
    assert (rates["failed"] > 0) == bool(failed)


def ended(log: RequestLog, name: str, received: float, end: float) -> Record:
    record = Record(name, 1, Timeline(received=received))
    log.begin(record)
    log.end(record, "stop", end)
    return record


def test_a_sequence_that_ends_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    timeline = Timeline(received=0.0)
    timeline.enter("prefill", 0.25)
    timeline.attempts.append(("p0", "d0"))
    timeline.enter("router_queue", 0.5)
    timeline.waited_for["decode"] = 0.4
    timeline.enter("prefill", 1.0)
    timeline.attempts.append((None, "d1"))
    timeline.enter("decode", 2.0)
    timeline.deliver(3, 2.0)
    log, record = RequestLog(), Record("cmpl-1f-0", 7, timeline, num_cached_tokens=4)
    log.begin(record)
    with caplog.at_level(logging.INFO):
        log.end(record, "length", 4.0)
    [line] = caplog.records
    stages = "receive 250.0, prefill 1250.0, router_queue 500.0, deliver 0.0, decode 2000.0"
    assert line.getMessage() == f"request cmpl-1f-0 length: 7 + 3 tokens on d1; ms: {stages}"
    assert vars(line)["fields"] == {
        "request_id": "cmpl-1f",
        "sequence": "cmpl-1f-0",
        "outcome": "length",
        "path": "local",
        "prefill_worker": None,
        "decode_worker": "d1",
        "attempts": 2,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "output_tokens": 3,
        "stages_ms": {
            "receive": 250.0,
            "prefill": 1250.0,
            "router_queue": 500.0,
            "deliver": 0.0,
            "decode": 2000.0,
        },
        "waited_for_ms": {"decode": 400.0},
    }


def test_the_log_is_bounded_and_keeps_the_slowest() -> None:
    log = RequestLog()
    slow = ended(log, "cmpl-slow-0", 0.0, 50.0)
    for i in range(2 * MAX_RECENT):
        ended(log, f"cmpl-{i}-0", 50.0, 50.0 + i / 1000)
    assert len(log.recent(5 * MAX_RECENT)) == MAX_RECENT
    assert log.recent(1)[0].request_id == f"cmpl-{2 * MAX_RECENT - 1}"
    assert slow not in log.recent(MAX_RECENT)
    assert log.slowest(1, now=60.0) == [slow]
    assert len(log.slowest(100, now=60.0)) == SLOW_PER_MINUTE
    assert log.find("cmpl-slow") == [slow]
    assert log.slowest(100, now=50.0 + 11 * 60.0) == []


def test_a_request_is_found_with_all_its_sequences_or_not_at_all() -> None:
    log = RequestLog()
    second, running = ended(log, "cmpl-a-1", 0.0, 1.0), Record("cmpl-a-0", 1, Timeline())
    log.begin(running)
    assert log.find("cmpl-a") == [running, second]
    assert log.find("cmpl-a-1") == [second]
    with pytest.raises(RequestNotFoundError, match="'cmpl-b' is neither"):
        log.find("cmpl-b")
