"""A request's timeline: its stages, its tokens' times, and who writes them."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from protocol.messages import Left
from protocol.sampling import SamplingParams
from router.answers import AnswerHead, CompletionShape
from router.generation import GenerationRequest, TokenChunk
from router.metrics import RouterMetrics
from router.output import Output
from router.stream import Choice, Job, run
from router.text import TextModel
from router.timeline import MAX_TIMES, Stage, Timeline, TokenTimes
from tests.router.conftest import ScriptedGenerator
from tests.router_scene import Scene, first, tokens


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
