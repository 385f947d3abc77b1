"""The dispatcher and its requests: who is asked, who hears of what, and who goes on."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import DeadlineError, UnavailableError, WorkerLostError
from protocol.messages import Cancel, Left, PrefillRequest, RequestFailed
from protocol.sampling import SamplingParams
from router import dispatch
from router.generation import GenerationRequest, TokenChunk
from tests.router_scene import (
    ONE_SLOT,
    REQUEST,
    SOON,
    Scene,
    error_of,
    first,
    output,
    registration,
    serving,
    tokens,
    until,
)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", 0.0)


def test_an_attempt_goes_on_with_the_tokens_that_were_delivered() -> None:
    scene = Scene("p0", "d0", "d1")
    running = scene.dispatch()
    [asked] = scene.wire.to("p0", PrefillRequest)
    assert (asked.request_id, asked.token_ids, asked.num_prompt_tokens) == ("r#1", [1, 2, 3], 3)
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8, 9))
    scene.say("d0", Left())
    [_, again] = scene.wire.to("p0", PrefillRequest)
    assert (again.request_id, again.num_prompt_tokens) == ("r#2", 3)
    assert again.token_ids == [1, 2, 3, 7, 8, 9]
    assert again.decode.worker_id == "d1"
    assert again.timeout <= asked.timeout
    assert scene.wire.to("p0", Cancel) == [Cancel(request_id="r#1")]
    scene.say("p0", first(2, 3, 10))
    scene.say("d1", tokens(2, 4, 11, 12, last=True))
    assert output(running) == [7, 8, 9, 10, 11, 12]
    assert scene.dispatcher.num_running == 0
    assert scene.count("request_retries", reason="worker_left") == 1
    assert [row["requests"] for row in scene.dispatcher.workers()] == [0, 0]


def test_what_a_former_attempt_still_says_is_counted_cancelled_and_not_delivered() -> None:
    scene = Scene("p0", "d0", "d1")
    running = scene.dispatch()
    scene.say("p0", first(1, 0, 7))
    scene.say("p0", RequestFailed(request_id="r#1", code="worker_lost", message="d0 is silent"))
    assert scene.wire.to("d0", Cancel) == [Cancel(request_id="r#1")]
    scene.say("d0", tokens(1, 1, 66))
    scene.say("d0", RequestFailed(request_id="r#1", code="worker_lost", message="late"))
    assert output(running) == [7]
    assert scene.count("stale_messages") == 2
    assert scene.wire.to("d0", Cancel) == [Cancel(request_id="r#1")] * 2


def test_an_unregistered_worker_is_not_listened_to() -> None:
    scene = Scene("p0", "d0")
    running = scene.dispatch()
    scene.say("p9", first(1, 0, 66))
    assert output(running) == []
    assert scene.count("stale_messages") == 1


def test_a_failed_attempt_goes_to_other_workers_at_once() -> None:
    scene = Scene("p0", "p1", "d0", "d1")
    scene.dispatch()
    failed = RequestFailed(request_id="r#1", code="worker_lost", message="KV transfer failed")
    scene.say("d0", failed)
    assert len(scene.wire.to("p1", PrefillRequest)) == 1
    assert scene.count("request_retries", reason="worker_lost") == 1


async def test_without_others_the_same_workers_are_tried_again_a_little_later() -> None:
    scene = Scene("p0", "d0")
    scene.dispatch()
    async with serving(scene):
        scene.say("d0", RequestFailed(request_id="r#1", code="overloaded", message="full"))
        assert len(scene.wire.to("p0", PrefillRequest)) == 1
        await until(scene, lambda: len(scene.wire.to("p0", PrefillRequest)) == 2, "p0", "d0")


async def test_a_request_waits_for_a_worker_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", SOON)
    scene = Scene("p0", "d0")
    scene.dispatch()
    async with serving(scene):
        scene.wire.gone.add(b"d0")
        await until(scene, lambda: scene.ids() == {"p0"}, "p0")
        scene.say("d1", registration("d1"))
        await until(scene, lambda: len(scene.wire.to("p0", PrefillRequest)) == 2, "p0", "d1")
    assert scene.count("request_retries", reason="decode_lost") == 1


async def test_a_request_that_waited_in_vain_ends_with_an_error() -> None:
    scene = Scene("p0", "d0")
    running = scene.dispatch()
    async with serving(scene):
        scene.say("d0", Left())
        error = await error_of(running)
    assert type(error) is WorkerLostError
    assert "d0" in str(error)
    assert scene.dispatcher.num_running == 0


async def test_the_shorter_of_both_timeouts_ends_a_request() -> None:
    scene = Scene("p0", "d0")
    request = GenerationRequest("r", [1], SamplingParams(max_tokens=9), timeout=0.05)
    running = scene.dispatch(request)
    async with serving(scene):
        assert type(await error_of(running)) is DeadlineError
    assert scene.wire.to("p0", Cancel)
    assert scene.wire.to("d0", Cancel)


def test_a_request_that_a_report_crosses_on_its_way_counts() -> None:
    scene = Scene("p0", "p1", "d0")
    for name in ("r", "s"):
        scene.dispatch(GenerationRequest(name, [1, 2, 3], SamplingParams(max_tokens=9)))
    scene.say("p1", first(1, 0, 7, "s"))
    scene.beat("p0", late=1)
    scene.dispatch(GenerationRequest("t", [4, 5, 6], SamplingParams(max_tokens=9)))
    assert [asked.request_id for asked in scene.wire.to("p1", PrefillRequest)] == ["s#1", "t#1"]


def test_a_prefill_worker_that_cannot_be_reached_is_passed_over() -> None:
    scene = Scene("p0", "p1", "d0")
    scene.wire.gone.add(b"p0")
    scene.dispatch()
    assert len(scene.wire.to("p1", PrefillRequest)) == 1
    assert scene.ids() == {"p1", "d0"}


def test_a_router_that_ends_fails_what_runs_waits_and_is_yet_to_come() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    waits = GenerationRequest("s", [1, 2, 3], SamplingParams(max_tokens=9))
    running = [scene.dispatch(), scene.dispatch(waits)]
    scene.dispatcher.shut_down()
    late = scene.dispatch(GenerationRequest("t", [1, 2, 3], SamplingParams(max_tokens=9)))
    for one in (*running, late):
        with pytest.raises(UnavailableError, match="shutting down"):
            one.output.take()
    for worker in ("p0", "d0"):
        assert scene.wire.to(worker, Cancel) == [Cancel(request_id="r#1")]
    assert len(scene.wire.to("p0", PrefillRequest)) == 1
    assert scene.dispatcher.num_running == 0


async def test_closing_the_generator_cancels_on_both_workers() -> None:
    scene = Scene("p0", "d0")
    chunks = scene.dispatcher.generate(REQUEST)
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0)
    scene.say("p0", first(1, 0, 100))
    assert await waiting == TokenChunk([100], num_cached_tokens=0)
    await chunks.aclose()
    for worker in ("p0", "d0"):
        assert scene.wire.to(worker, Cancel) == [Cancel(request_id="r#1")]
    assert scene.dispatcher.num_running == 0
