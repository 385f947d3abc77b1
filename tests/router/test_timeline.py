"""Where a request's time went: the timeline, the log of requests, and the activity window."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from prometheus_client import CollectorRegistry

from protocol.errors import DeadlineError, RequestNotFoundError
from protocol.messages import Left
from protocol.sampling import SamplingParams
from router.activity import NUM_SLOTS, SLOT, Activity, Histogram, Objective, percentiles
from router.answers import AnswerHead, CompletionShape
from router.generation import GenerationRequest, TokenChunk
from router.metrics import RouterMetrics, SequenceTimer
from router.output import Output
from router.request_log import MAX_RECENT, SLOW_PER_MINUTE, Record, RequestLog
from router.stream import Choice, Job, run
from router.text import TextModel
from router.timeline import MAX_TIMES, Stage, Timeline, TokenTimes
from tests.router.conftest import PATIENCE, Router, ScriptedGenerator
from tests.router_scene import Scene, first, tokens

GOAL = Objective(time_to_first_token=1.0, time_per_output_token=0.1)


def request() -> GenerationRequest:
    return GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=9))


def names(timeline: Timeline) -> list[str]:
    return [stage.name for stage in timeline.stages(timeline.received)]


def test_the_stages_add_up_to_the_time_to_first_token() -> None:
    timeline = Timeline.begun(received=10.0, read=10.25)
    for at, stage in ((10.5, "router_queue"), (12.0, "prefill"), (15.0, "decode")):
        timeline.enter(stage, at)
    timeline.deliver(1, 15.25)
    timeline.deliver(2, 16.0)
    timeline.enter("deliver", 17.0)
    timeline.end(17.5)
    assert timeline.stages(99.0) == [
        Stage("receive", 10.0, 0.25),
        Stage("tokenise", 10.25, 0.25),
        Stage("router_queue", 10.5, 1.5),
        Stage("prefill", 12.0, 3.0),
        Stage("deliver", 15.0, 0.25),
        Stage("decode", 15.25, 1.75),
        Stage("deliver", 17.0, 0.5),
    ]
    assert timeline.time_to_first_token == 5.25
    assert sum(stage.seconds for stage in timeline.stages(99.0)[:5]) == 5.25
    assert timeline.overhead == 0.5 + 0.25
    assert timeline.transfer is None
    assert timeline.time_per_output_token == pytest.approx(0.75 / 2)
    assert timeline.longest_wait(99.0) == 5.25


def test_a_workers_account_divides_a_stage() -> None:
    timeline = Timeline(received=0.0)
    timeline.enter("prefill", 1.0)
    timeline.account({"prefill_queue": 0.5, "grant": 0.25, "prefill": 2.0}, 4.0)
    timeline.enter("decode", 4.0)
    timeline.deliver(1, 4.5)
    timeline.account({"first_step": 1.0}, 7.0)
    timeline.deliver(1, 7.0)
    timeline.end(9.0)
    assert timeline.stages(9.0) == [
        Stage("receive", 0.0, 1.0),
        Stage("to_prefill", 1.0, 0.25),
        Stage("prefill_queue", 1.25, 0.5),
        Stage("grant", 1.75, 0.25),
        Stage("prefill", 2.0, 2.0),
        Stage("deliver", 4.0, 0.5),
        Stage("transfer", 4.5, 1.5),
        Stage("first_step", 6.0, 1.0),
        Stage("decode", 7.0, 2.0),
    ]
    assert timeline.transfer == 1.5


def test_an_account_of_more_than_there_was_is_cut() -> None:
    timeline = Timeline(received=0.0)
    timeline.enter("prefill", 1.0)
    timeline.account({"prefill_queue": 5.0, "prefill": 5.0}, 4.0)
    assert sum(stage.seconds for stage in timeline.stages(4.0)) == 4.0


def test_a_first_token_that_is_delivered_after_the_last_one_came() -> None:
    timeline = Timeline(received=0.0)
    for at, stage in ((1.0, "prefill"), (2.0, "decode"), (2.5, "deliver")):
        timeline.enter(stage, at)
    timeline.deliver(4, 3.0)
    timeline.end(3.5)
    assert timeline.stages(9.0)[2:] == [Stage("deliver", 2.0, 1.0), Stage("deliver", 3.0, 0.5)]


def test_what_happens_while_the_first_token_is_written_is_no_part_of_the_time_to_it() -> None:
    timeline = Timeline(received=0.0)
    timeline.enter("prefill", 1.0)
    timeline.enter("decode", 2.0)
    timeline.account({"first_step": 0.5}, 3.0)  # by a token that waits behind the first one
    timeline.enter("router_queue", 3.5)  # another attempt
    timeline.deliver(1, 4.0)
    assert timeline.stages(5.0)[2:] == [Stage("deliver", 2.0, 2.0), Stage("router_queue", 4.0, 1.0)]


def test_who_had_the_sequence_in_a_stage() -> None:
    timeline = Timeline(received=0.0)
    for at, attempt in ((1.0, ("p0", "d0")), (4.0, (None, "d1"))):
        timeline.enter("router_queue", at)
        timeline.enter("prefill", at + 1)
        timeline.attempts.append(attempt)
        timeline.account({"prefill_queue": 0.25, "prefill": 0.25}, at + 2)
        timeline.enter("decode", at + 2)
    timeline.end(7.0)
    workers = [(stage.name, timeline.worker(stage)) for stage in timeline.stages(7.0)]
    prefill = ["to_prefill", "prefill_queue", "prefill"]
    assert workers == [
        ("receive", None),
        ("router_queue", None),
        *((name, "p0") for name in prefill),
        ("decode", "d0"),
        ("router_queue", None),
        *((name, "d1") for name in prefill),
        ("decode", "d1"),
    ]


def test_a_sequence_under_way_is_in_its_last_stage_until_now() -> None:
    timeline = Timeline(received=0.0)
    timeline.enter("router_queue", 1.0)
    assert timeline.stages(5.0) == [Stage("receive", 0.0, 1.0), Stage("router_queue", 1.0, 4.0)]
    assert timeline.longest_wait(5.0) == 5.0
    assert timeline.time_to_first_token is None


def test_the_longest_wait_is_a_gap_between_tokens() -> None:
    timeline = Timeline(received=0.0)
    for at in (1.0, 1.1, 4.0, 4.1):
        timeline.deliver(1, at)
    timeline.end(4.2)
    assert timeline.longest_wait(9.0) == pytest.approx(2.9)


@pytest.mark.parametrize("at_once", [1, 3])
def test_token_times_are_thinned(at_once: int) -> None:
    times = TokenTimes()
    for start in range(0, 3 * MAX_TIMES, at_once):
        times.add(at_once, float(start))
    assert times.count == 3 * MAX_TIMES
    assert times.stride == 4
    expected = [float(i - i % at_once) for i in range(0, 3 * MAX_TIMES, 4)]
    assert list(times.times) == expected


def test_the_dispatcher_writes_the_stages_of_each_attempt() -> None:
    scene = Scene("p0", "d0", "d1")
    running = scene.dispatch(request())
    timeline = running.request.timeline
    assert timeline.stage == "prefill"
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8))
    scene.say("d0", Left())
    scene.say("p0", first(2, 2, 9))
    scene.say("d1", tokens(2, 3, 10, last=True))
    again = ["router_queue", "prefill", "decode"]
    assert names(timeline) == ["receive", "prefill", "decode", *again, "deliver"]
    assert timeline.attempts == [("p0", "d0"), ("p0", "d1")]


@pytest.mark.parametrize("num_sequences", [1, 2])
async def test_a_token_is_delivered_once_its_consumer_comes_back(
    text: TextModel, num_sequences: int
) -> None:
    generator = ScriptedGenerator([TokenChunk([300]), TokenChunk([301]), TokenChunk([302], "stop")])
    choices = [
        Choice(request(), Output(index, text.detokenizer([], skip_special_tokens=True)))
        for index in range(num_sequences)
    ]
    job = Job(
        head=AnswerHead("cmpl-1", "m", "fp"),
        shape=CompletionShape(None),
        choices=choices,
        num_sequences=num_sequences,
        num_shown=num_sequences,
        stream=True,
        include_usage=False,
        return_token_ids=False,
    )
    written: list[list[float]] = [[] for _ in choices]
    async for piece in run(job, generator, RouterMetrics(CollectorRegistry())):
        await asyncio.sleep(0.01)  # a slow client
        written[piece.index].append(time.monotonic())
    for choice, times in zip(choices, written, strict=True):
        timeline = choice.request.timeline
        assert timeline.first_token is not None
        assert times[0] <= timeline.first_token <= times[1]


def test_a_request_begins_with_its_first_byte(router: Router) -> None:
    router.say("Hi")
    body = json.dumps({"model": "test", "prompt": "Some", "max_tokens": 9}).encode()
    with socket.create_connection(("127.0.0.1", router.port), PATIENCE) as connection:
        for part in (b"POST /v1/completions HTTP/1.1\r\n", b"Connection: close\r\n"):
            connection.sendall(part)
            time.sleep(0.1)
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
        time.sleep(0.1)
        connection.sendall(body)
        while connection.recv(65_536):
            pass
    [row] = httpx.get(f"{router.url}/admin/requests", timeout=PATIENCE).json()["recent"]
    found = httpx.get(f"{router.url}/admin/requests/{row['id']}", timeout=PATIENCE).json()
    first = found["sequences"][0]["stages"][0]
    assert (first["name"], first["start"]) == ("receive", 0.0)
    assert first["seconds"] >= 0.25


def timed(metrics: RouterMetrics, error: BaseException | None) -> Record:
    with SequenceTimer(metrics, request()) as timer:
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
    rates = metrics.activity.present(GOAL, metrics.log.recent(1)[0].timeline.received)["rates"]
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


def test_a_request_has_come_though_the_router_is_too_busy_to_read_it(router: Router) -> None:
    busy = threading.Event()

    def script(_: GenerationRequest) -> list[TokenChunk]:
        if not busy.is_set():
            busy.set()
            time.sleep(2.0)  # on the event loop
        return [TokenChunk([5], "length")]

    router.generator.scripts = script
    ask = partial(router.post, "/v1/completions", model="test", prompt="Hello")
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(ask)
        assert busy.wait(PATIENCE)
        answer = ask().json()
        other.result()
    found = httpx.get(f"{router.url}/admin/requests/{answer['id']}", timeout=PATIENCE).json()
    stage = found["sequences"][0]["stages"][0]
    assert stage["name"] == "receive"
    assert 0.25 < stage["seconds"] < PATIENCE


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


def test_percentiles_are_within_one_percent() -> None:
    histogram, other = Histogram(), Histogram()
    for i in range(1, 1001):
        (histogram if i % 2 else other).add(i / 1000)
    found = percentiles([histogram, other])
    assert found == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99}, rel=0.011)
    assert percentiles([Histogram()]) is None
    histogram = Histogram()
    histogram.add(0.0)
    assert percentiles([histogram]) == pytest.approx(
        {"p50": 1e-6, "p90": 1e-6, "p99": 1e-6}, rel=0.1
    )


def test_goodput_counts_what_is_within_both_objectives() -> None:
    activity = Activity(0.0)
    for ttft, tpot in ((0.5, 0.05), (2.0, 0.05), (0.5, 0.2), (0.5, None)):
        activity.arrived(10.0)
        activity.first_token(ttft, 7, 10.0)
        activity.tokens(3, None, 10.0)
        activity.served(ttft, tpot, 10.0)
    activity.failed(10.0)
    window = activity.present(GOAL, 20.0)
    assert window["seconds"] == 20.0
    assert window["goodput"]["requests_per_second"] == 0.1
    assert window["goodput"]["attainment"] == 0.4
    assert window["rates"] == {
        "requests": 0.2, "failed": 0.05, "prompt_tokens": 1.4, "output_tokens": 0.6,
    }  # fmt: skip


def test_what_is_older_than_a_minute_is_not_present_and_older_than_ten_is_gone() -> None:
    activity = Activity(0.0)
    activity.tokens(5, 0.01, 1.0)
    assert activity.present(GOAL, 30.0)["inter_token_latency"] is not None
    assert activity.present(GOAL, 90.0)["inter_token_latency"] is None
    history = activity.history(GOAL, 0, 90.0)
    assert [point["slot"] for point in history] == list(range(1, 18))
    everything = activity.history(GOAL, -1, 90.0)
    assert everything[0]["output_tokens"] == 1.0
    assert [point["slot"] for point in activity.history(GOAL, 15, 90.0)] == [16, 17]
    assert activity.history(GOAL, 17, 90.0) == []
    assert activity.history(GOAL, 18, 90.0) == everything
    later = NUM_SLOTS * SLOT + 90.0
    assert len(activity.history(GOAL, 0, later)) == NUM_SLOTS - 1
    assert all(point["output_tokens"] == 0 for point in activity.history(GOAL, 0, later))
