"""Requests that wait for their turn in the router, and every way in which that ends."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import DeadlineError, OverloadedError, UnavailableError
from protocol.messages import Cancel, Left, PrefillRequest, RequestFailed, WorkerLoad
from protocol.sampling import SamplingParams
from router import dispatch
from router.generation import GenerationRequest, QueueState
from router.lifecycle_events import ClientGone
from tests.router_scene import (
    LOAD,
    ONE_SLOT,
    Scene,
    error_of,
    first,
    output,
    registration,
    serving,
    tokens,
    until,
)


def request(name: str, timeout: float | None = None, max_tokens: int = 2) -> GenerationRequest:
    return GenerationRequest(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens), timeout)


def asked(scene: Scene) -> list[str]:
    """Attempts in the order in which prefill was asked for them."""
    return [asked.request_id for asked in scene.wire.all(PrefillRequest)]


def finish(scene: Scene, attempt: int = 1) -> None:
    """End the scene's request ``r``."""
    scene.say("p0", first(attempt, 0, 7))
    scene.say("d0", tokens(attempt, 1, 8, last=True))


def test_a_request_waits_in_the_router_until_both_workers_have_room() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    scene.dispatch(request("r"))
    scene.dispatch(request("s"))
    assert asked(scene) == ["r#1"]
    assert scene.metrics.get_sample_value("kvferry_num_requests_waiting") == 1
    assert scene.dispatcher.not_ready_reason() is None  # a queue is no reason to go elsewhere
    finish(scene)
    assert asked(scene) == ["r#1", "s#1"]
    assert scene.metrics.get_sample_value("kvferry_num_requests_waiting") == 0
    assert scene.metrics.get_sample_value("kvferry_request_queue_time_seconds_count") == 2


def test_room_that_a_worker_reports_is_given_away() -> None:
    busy = ONE_SLOT.model_copy(update={"num_promised": 1})  # another router's
    scene = Scene("p0", "d0", load=busy)
    scene.dispatch(request("r"))
    assert asked(scene) == []
    scene.beat("d0", ONE_SLOT)
    assert asked(scene) == ["r#1"]


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    scene.dispatch(request("r"))
    chunks = scene.dispatcher.generate(request("s"))
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0)
    assert scene.dispatcher.num_running == 2
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert scene.dispatcher.num_running == 1
    finish(scene)
    assert asked(scene) == ["r#1"]
    assert not scene.wire.all(Cancel)


async def test_a_deadline_passes_in_the_queue_too() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    scene.dispatch(request("r"))
    waiting = scene.dispatch(request("s", timeout=0.05))
    async with serving(scene):
        assert type(await error_of(waiting)) is DeadlineError
    assert asked(scene) == ["r#1"]


async def test_who_has_waited_for_too_long_is_turned_away() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT, max_queue_time=0.05)
    scene.dispatch(request("r"))
    waiting = scene.dispatch(request("s"))
    async with serving(scene):
        assert type(await error_of(waiting)) is OverloadedError
    assert scene.count("requests_shed", reason="overdue") == 1


async def test_who_waits_for_a_pool_that_is_gone_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", 0.0)
    scene = Scene("p0", "d0", load=ONE_SLOT)
    scene.dispatch(request("r"))
    waiting = scene.dispatch(request("s"))
    scene.say("d0", Left())
    async with serving(scene):
        assert type(await error_of(waiting)) is UnavailableError


def test_the_hard_bound_counts_who_waits_and_who_runs() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT, max_num_requests=2)
    scene.dispatch(request("r"))
    scene.dispatch(request("s"))
    with pytest.raises(OverloadedError, match="1 requests are waiting"):
        scene.dispatch(request("t"))
    assert scene.count("requests_shed", reason="full") == 1
    assert scene.dispatcher.num_running == 2


async def test_a_request_that_decode_had_no_room_for_waits_and_comes_before_new_ones() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    scene.dispatch(request("r"))
    scene.dispatch(request("s"))
    full = ONE_SLOT.model_copy(update={"num_promised": 1})
    scene.beat("d0", full)
    scene.say("p0", RequestFailed(request_id="r#1", code="overloaded", message="full"))
    async with serving(scene):
        await until(scene, lambda: scene.count("request_retries", reason="overloaded") == 1)
        assert asked(scene) == ["r#1"]
        await until(scene, lambda: len(asked(scene)) == 2, "p0", "d0")
    assert asked(scene) == ["r#1", "r#2"]
    finish(scene, attempt=2)
    assert asked(scene) == ["r#1", "r#2", "s#1"]


def test_what_was_interrupted_goes_on_before_what_has_not_begun() -> None:
    scene = Scene("p0", "d0", load=ONE_SLOT)
    running = scene.dispatch(request("r"))
    scene.dispatch(request("s"))
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", Left())
    scene.say("d1", registration("d1", load=ONE_SLOT))
    assert asked(scene) == ["r#1", "r#2"]
    scene.say("p0", first(2, 1, 8))
    assert output(running) == [7, 8]


def test_a_queue_at_prefill_is_not_taken_for_a_lack_of_places() -> None:
    now = 0.0
    scene = Scene("p0", "d0", max_queue_time=5.0, clock=lambda: now)
    scene.dispatch(request("r"))
    now = 100.0  # seconds that a request takes, most of them on decode
    finish(scene)
    slow = WorkerLoad(prefill_tokens_per_second=1.0)  # three prompts of three tokens: 9 s
    scene.beat("p0", slow)
    scene.dispatch(request("a"))
    scene.dispatch(request("b"))
    scene.beat("p0", slow.model_copy(update={"waiting_tokens": 4}))
    scene.dispatch(request("c"))  # it waits, and 4 s are not too long
    assert asked(scene) == ["r#1", "a#1", "b#1"]
    with pytest.raises(OverloadedError, match="about 7 s") as caught:
        scene.dispatch(request("d"))
    assert caught.value.retry_after == pytest.approx(3.0)


def test_it_is_told_for_want_of_which_pool_requests_waited() -> None:
    now = 100.0
    slow = LOAD.model_copy(update={"prefill_tokens_per_second": 4})
    scene = Scene("p0", load=slow, clock=lambda: now)
    scene.say("d0", registration("d0", load=LOAD.model_copy(update={"max_num_seqs": 2})))
    scene.dispatch(request("r"))
    scene.dispatch(request("other"))
    waiting = scene.dispatch(request("s"))  # two prompts and two sequences are enough
    assert scene.dispatcher.queue().short_of == ["decode", "prefill"]
    now += 1.0
    later, last = scene.dispatch(request("t")), scene.dispatch(request("u"))
    now += 2.0
    scene.say("p0", first(1, 0, 7))  # room for a prompt
    assert scene.dispatcher.queue().short_of == ["decode"]
    now += 4.0
    scene.say("d0", tokens(1, 1, 8, last=True))
    assert asked(scene) == ["r#1", "other#1", "s#1"]
    times = waiting.request.timeline
    assert times.waited_for == {"prefill": 3.0, "decode": 7.0}
    assert times.details(now)["waited_for"] == {"prefill": 3.0, "decode": 7.0}
    now += 8.0
    scene.dispatcher._handle(later, ClientGone())  # who gives up has waited, too
    now += 16.0
    for running in (waiting, later, last):
        scene.dispatcher._handle(running, ClientGone())
    assert times.waited_for == {"prefill": 3.0, "decode": 7.0}
    assert later.request.timeline.waited_for == {"prefill": 10.0, "decode": 14.0}
    scene.beat("d0")
    assert scene.count("queue_short_of_pool_seconds", pool="prefill") == 27.0
    assert scene.dispatcher.queue().short_of == []


def test_a_request_that_waits_again_tells_both_waits() -> None:
    now = 100.0
    scene = Scene("p0", "d0", load=ONE_SLOT, clock=lambda: now)
    scene.dispatch(request("other"))
    running = scene.dispatch(request("r"))
    now += 2.0
    scene.say("p0", first(1, 0, 7, "other"))
    scene.say("d0", tokens(1, 1, 8, last=True, name="other"))
    now += 50.0
    scene.say("d0", Left())
    now += 4.0
    scene.say("d1", registration("d1", load=ONE_SLOT))
    assert asked(scene) == ["other#1", "r#1", "r#2"]
    assert running.request.timeline.waited_for == {"decode": 6.0}


def test_the_queue_tells_how_long_another_request_would_wait() -> None:
    now = 100.0
    scene = Scene("p0", "d0", load=ONE_SLOT, clock=lambda: now)
    assert scene.dispatcher.queue() == QueueState([], [], 0.0)
    scene.dispatch(request("r"))
    now += 4.0
    finish(scene)  # a request takes four seconds
    for name in ("s", "t", "u"):
        scene.dispatch(request(name))
    now += 1.0
    state = scene.dispatcher.queue()
    assert [tokens for _, tokens in state.requests] == [3, 3]
    assert state.row() == {"waiting": 2, "short_of": ["decode"], "wait": 12.0}
    now += 20.0
    assert scene.dispatcher.queue().wait == 21.0  # the forecast was wrong
