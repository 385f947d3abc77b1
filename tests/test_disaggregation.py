"""Who computes a prompt, in every mode; and the dispatcher's requests to decode alone."""

from __future__ import annotations

import pytest

from protocol.errors import ConfigError, UnavailableError
from protocol.messages import (
    Cancel,
    GenerateRequest,
    Left,
    PrefillRequest,
    RequestFailed,
    WorkerLoad,
)
from protocol.sampling import SamplingParams
from router.capacity import Demand, queued_tokens
from router.disaggregation import Disaggregation, Mode
from router.generation import GenerationRequest
from router.lifecycle import RequestLifecycle
from router.lifecycle_events import AttemptFailed, CancelOn, Placed, Retry, WorkerLost
from router.registry import Assignment, Registry
from tests.router_scene import LOAD, REQUEST, Scene, first, output, registration, tokens

MEASURED = LOAD.model_copy(update={"prefill_tokens_per_second": 1000.0})


def pools(*workers: str, load: WorkerLoad = MEASURED) -> Registry:
    registry = Registry(timeout=1.0)
    for name in workers:
        registry.register(name.encode(), registration(name, load=load), now=0.0)
    return registry


def path(disaggregation: Disaggregation, registry: Registry, num_tokens: int) -> str | None:
    pair = disaggregation.choose(registry, Demand(num_tokens, num_tokens + 10))
    if pair is None:
        return None
    return "remote" if pair.prefill else "local"


def auto(handoff: float | None = 0.02, local_tokens: int | None = None) -> Disaggregation:
    """At a thousand tokens a second, 20 ms are 20 tokens."""
    disaggregation = Disaggregation("auto", local_tokens)
    if handoff is not None:
        disaggregation.handed_off(handoff)
    return disaggregation


@pytest.mark.parametrize(
    ("mode", "workers", "expected"),
    [
        ("always", ("p0", "d0"), "remote"),
        ("always", ("d0",), None),
        ("never", ("p0", "d0"), "local"),
        ("never", ("d0",), "local"),
        ("never", ("p0",), None),
        ("auto", ("p0", "d0"), "remote"),
        ("auto", ("d0",), "local"),
        ("auto", ("p0",), None),
    ],
)
def test_the_modes(mode: Mode, workers: tuple[str, ...], expected: str | None) -> None:
    disaggregation, registry = Disaggregation(mode), pools(*workers)
    assert path(disaggregation, registry, 500) == expected
    if expected is None:
        missing = "decode" if "p0" in workers else "prefill"
        with pytest.raises(UnavailableError, match=f"no {missing} worker is serving"):
            disaggregation.check(registry)
    else:
        disaggregation.check(registry)
        assert disaggregation.colocated(registry) == (expected == "local")


def test_what_takes_less_time_than_a_hand_off_is_computed_by_decode() -> None:
    registry = pools("p0", "d0")
    assert path(auto(), registry, 20) == "local"
    assert path(auto(), registry, 21) == "remote"
    assert path(auto(0.1), registry, 100) == "local"


def test_without_measurements_prompts_go_to_prefill() -> None:
    assert path(auto(None), pools("p0", "d0"), 1) == "remote"
    assert path(auto(), pools("p0", "d0", load=LOAD), 1) == "remote"


def test_a_decode_worker_that_has_computed_none_counts_as_fast_as_prefill() -> None:
    registry = pools("p0")
    registry.register(b"d0", registration("d0", load=LOAD), now=0.0)
    assert path(auto(), registry, 20) == "local"
    assert path(auto(), registry, 21) == "remote"


def test_the_least_hand_off_counts_and_is_forgotten() -> None:
    disaggregation, registry = auto(0.02), pools("p0", "d0")
    disaggregation.handed_off(0.001)
    for _ in range(20):
        disaggregation.handed_off(0.02)
    assert path(disaggregation, registry, 20) == "remote"
    for _ in range(200):
        disaggregation.handed_off(0.02)
    assert path(disaggregation, registry, 20) == "local"
    assert path(disaggregation, registry, 21) == "remote"


def test_the_limit_may_be_set() -> None:
    assert path(auto(None, local_tokens=64), pools("p0", "d0"), 64) == "local"
    assert path(auto(1.0, local_tokens=0), pools("p0", "d0"), 1) == "remote"
    with pytest.raises(ConfigError, match="--local-prefill-tokens goes with"):
        Disaggregation("always", 64)


def test_it_is_changed_while_it_serves() -> None:
    disaggregation, registry = auto(), pools("p0", "d0")
    row = {"mode": "auto", "local_prefill_tokens": None, "longest_local_prompt": 20}
    assert disaggregation.row(registry) == row
    disaggregation.change("auto", 64)
    assert path(disaggregation, registry, 64) == "local"
    row |= {"local_prefill_tokens": 64, "longest_local_prompt": 64}
    assert disaggregation.row(registry) == row
    with pytest.raises(ConfigError):
        disaggregation.change("never", 64)
    assert disaggregation.row(registry) == row
    disaggregation.change("always")
    assert path(disaggregation, registry, 1) == "remote"
    assert disaggregation.row(registry)["longest_local_prompt"] == 0
    disaggregation.change("auto")
    assert path(disaggregation, registry, 20) == "local", "what was measured is still known"


def test_a_decode_worker_with_a_prompt_or_half_full_is_spared() -> None:
    registry = pools("p0", "d0", load=MEASURED.model_copy(update={"max_num_seqs": 4}))
    [decode] = registry.serving("decode")
    decode.give("a", Assignment(9, 9, begun=True, prompt_tokens=9))
    assert path(auto(), registry, 5) == "remote"
    decode.goes_on("a", 9)  # it has its first token
    assert path(auto(), registry, 5) == "local"
    decode.give("b", Assignment(9, 9, begun=True))
    assert path(auto(), registry, 5) == "remote"


def test_while_prefill_is_full_short_prompts_need_not_wait() -> None:
    registry = pools("p0", "d0")
    [prefill] = registry.serving("prefill")
    for number in range(2):
        prefill.give(str(number), Assignment(900, 900, begun=True, prompt_tokens=900))
    assert path(auto(), registry, 5) == "local"
    assert path(auto(), registry, 500) is None


def test_colocated_prompts_wait_in_the_router_once_half_a_second_is_queued() -> None:
    registry = pools("d0")
    [decode] = registry.serving("decode")
    for number in range(2):
        assert path(auto(), registry, 400) == "local"
        decode.give(str(number), Assignment(400, 400, begun=True, prompt_tokens=400))
    assert queued_tokens(decode) == 800
    assert path(auto(), registry, 400) is None
    decode.goes_on("0", 400)
    assert path(auto(), registry, 400) == "local"


# A request's life on decode alone ------------------------------------------------------------


def test_an_attempt_on_one_worker_is_cancelled_there_and_avoids_it() -> None:
    request = RequestLifecycle("r", max_retries=3)
    request.handle(Placed(None, "d"))
    assert request.handle(WorkerLost("p")) == []
    assert request.handle(WorkerLost("d")) == [CancelOn("d", "r#1"), Retry("decode_lost")]
    request.handle(Placed(None, "e"))
    request.handle(AttemptFailed("e", UnavailableError("leaving")))
    assert request.avoid == {"e"}


def colocated(*workers: str, **options: object) -> Scene:
    return Scene(*workers, disaggregation=Disaggregation("auto"), **options)


def test_without_prefill_decode_is_asked_and_its_tokens_are_delivered() -> None:
    scene = colocated("d0")
    running = scene.dispatch()
    [asked] = scene.wire.to("d0", GenerateRequest)
    assert (asked.request_id, asked.token_ids, asked.num_prompt_tokens) == ("r#1", [1, 2, 3], 3)
    scene.say("d0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8, 9, last=True))
    assert output(running) == [7, 8, 9]
    assert scene.dispatcher.num_running == 0
    assert [row["requests"] for row in scene.dispatcher.workers()] == [0]
    assert scene.count("requests_path", path="local") == 1
    assert REQUEST.timeline.attempts[-1] == (None, "d0")
    assert scene.dispatcher.colocated


def test_a_lost_prefill_pool_is_replaced_by_decode_and_replaces_it_again() -> None:
    scene = colocated("p0", "d0")
    running = scene.dispatch()
    assert len(scene.wire.to("p0", PrefillRequest)) == 1
    scene.say("p0", Left())
    assert scene.dispatcher.not_ready_reason() is None
    [asked] = scene.wire.to("d0", GenerateRequest)
    assert asked.request_id == "r#2"
    scene.say("d0", first(2, 0, 7))
    scene.say("p1", registration("p1"))
    scene.dispatch(GenerationRequest("s", [1] * 90, SamplingParams(max_tokens=9)))
    assert len(scene.wire.to("p1", PrefillRequest)) == 1
    assert output(running) == [7]
    paths = [scene.count("requests_path", path=path) for path in ("remote", "local")]
    assert paths == [2, 1]


def test_a_request_that_waits_for_prefill_is_served_once_it_need_not() -> None:
    scene = Scene("p0", "d0", disaggregation=Disaggregation("always"))
    scene.dispatch()
    scene.say("p0", Left())
    assert scene.wire.to("d0", GenerateRequest) == []
    scene.dispatcher.disaggregate("auto", None)
    assert len(scene.wire.to("d0", GenerateRequest)) == 1
    assert scene.dispatcher.disaggregation()["mode"] == "auto"


def test_a_lost_decode_worker_is_followed_by_another_from_the_next_token() -> None:
    scene = colocated("d0", "d1")
    running = scene.dispatch()
    scene.say("d0", first(1, 0, 7))
    scene.say("d0", Left())
    [asked] = scene.wire.to("d1", GenerateRequest)
    assert (asked.token_ids, asked.num_prompt_tokens) == ([1, 2, 3, 7], 3)
    scene.say("d1", first(2, 1, 8))
    assert output(running) == [7, 8]


def test_a_refusal_by_decode_is_tried_elsewhere() -> None:
    scene = colocated("d0", "d1")
    scene.dispatch()
    scene.say("d0", RequestFailed(request_id="r#1", code="unavailable", message="leaving"))
    assert scene.wire.to("d0", Cancel) == [Cancel(request_id="r#1")]
    assert len(scene.wire.to("d1", GenerateRequest)) == 1


def test_hand_offs_are_measured_without_the_first_step() -> None:
    now = 100.0
    scene = colocated("p0", "d0", load=MEASURED, clock=lambda: now)
    running = scene.dispatch()
    scene.say("p0", first(1, 0, 7))
    now += 0.05
    [update] = tokens(1, 1, 8).updates
    told = update.model_copy(update={"account": {"first_step": 0.02}})
    scene.say("d0", tokens(1, 1, 8).model_copy(update={"updates": [told]}))
    assert output(running) == [7, 8]
    seconds = scene.metrics.get_sample_value("kvferry_handoff_seconds_sum")
    assert seconds == pytest.approx(0.03)
    scene.dispatch(GenerationRequest("s", [1] * 30, SamplingParams(max_tokens=9)))
    scene.dispatch(GenerationRequest("t", [1] * 31, SamplingParams(max_tokens=9)))
    assert [m.request_id for m in scene.wire.to("d0", GenerateRequest)] == ["s#1"]
    assert [m.request_id for m in scene.wire.to("p0", PrefillRequest)] == ["r#1", "t#1"]


def test_a_scored_prompt_counts_as_if_nothing_of_it_were_cached() -> None:
    plain, scored = (
        GenerationRequest(name, [1] * 40, SamplingParams(max_tokens=9, prompt_logprobs=logprobs))
        for name, logprobs in (("plain", None), ("scored", 0))
    )
    scene = colocated("d0")
    fingerprint = registration("d0").fingerprint
    keys = [len(scene.dispatch(request).prefix(fingerprint)) for request in (plain, scored)]
    assert keys == [9, 0]
