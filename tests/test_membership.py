"""How the router finds its workers present, absent, twice there, or on their way out."""

from __future__ import annotations

import pytest

from protocol.errors import UnavailableError, WorkerNotFoundError
from protocol.messages import (
    Drain,
    Leaving,
    Left,
    PrefillRequest,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    RouterHeartbeat,
)
from router import membership
from tests.router_scene import Scene, first, output, registration, serving, tokens, until


def states(scene: Scene) -> dict[str, tuple[str, str, str | None]]:
    rows = scene.dispatcher.workers()
    return {row["id"]: (row["role"], row["state"], row["next_role"]) for row in rows}


def test_a_second_worker_with_the_same_id_is_refused_while_the_first_is_connected() -> None:
    scene = Scene("p0")
    scene.say("p0-again", registration("p0", epoch=2))
    [refused] = scene.wire.to("p0-again", RegistrationRefused)
    assert "pid 1 on h" in refused.reason
    assert [row["epoch"] for row in scene.dispatcher.workers()] == [1]
    scene.wire.gone.add(b"p0")
    scene.say("p0-again", registration("p0", epoch=2))
    assert scene.wire.to("p0-again", Registered)
    assert [row["epoch"] for row in scene.dispatcher.workers()] == [2]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_starts_again_takes_no_part_in_what_it_held(role: str) -> None:
    scene = Scene("p0", "p1", "d0", "d1")
    scene.dispatch()
    worker = role[0] + "0"
    scene.wire.gone.add(worker.encode())
    scene.say(f"{worker}-again", registration(worker, epoch=2))
    assert [m.request_id for m in scene.wire.all(PrefillRequest)] == ["r#1", "r#2"]
    assert scene.count("request_retries", reason=f"{role}_lost") == 1


def test_a_worker_that_dropped_its_work_registers_anew_and_its_requests_go_on() -> None:
    scene = Scene("p0", "d0")
    scene.dispatch()
    scene.say("p0", registration("p0"))  # a repetition changes nothing
    assert len(scene.wire.to("p0", PrefillRequest)) == 1
    scene.say("p0", registration("p0", session=1))
    assert len(scene.wire.to("p0", PrefillRequest)) == 2
    last = [type(message) for peer, message in scene.wire.sent if peer == b"p0"][-2:]
    assert last == [Registered, PrefillRequest], "what comes before the answer is ignored"


async def test_a_connection_that_is_gone_is_noticed_without_any_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "SILENCE", 1e9)
    scene = Scene("p0", "d0")
    async with serving(scene):
        scene.wire.gone.add(b"p0")
        await until(scene, lambda: scene.ids() == {"d0"})


async def test_silence_loses_a_worker_that_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SILENCE", 0.3)
    monkeypatch.setattr(membership, "HEARTBEAT_INTERVAL", 0.05)
    scene = Scene("p0", "d0")
    async with serving(scene):
        await until(scene, lambda: scene.ids() == {"d0"}, "d0")
        scene.beat("p0")
        assert scene.wire.to("p0", RegisterAgain)
        scene.say("p0", registration("p0", session=1))
        assert scene.ids() == {"d0", "p0"}


def test_a_router_that_is_late_itself_blames_nobody() -> None:
    now = 0.0
    scene = Scene("p0", "d0", clock=lambda: now)
    watch = scene.dispatcher._members.watch
    watch()
    for _ in range(20):
        now += 0.95 * membership.SILENCE
        watch()
        scene.beat("p0")  # which waited to be read
        now += 0.95 * membership.SILENCE
        watch()
        scene.beat("d0")
    assert scene.ids() == {"p0", "d0"}
    silent_since = now
    while scene.ids() == {"p0", "d0"}:
        now += membership.HEARTBEAT_INTERVAL
        watch()
        scene.beat("d0")
    assert scene.ids() == {"d0"}
    assert now - silent_since <= membership.SILENCE + membership.HEARTBEAT_INTERVAL


def test_every_word_of_a_worker_is_a_sign_of_life() -> None:
    now = 0.0
    scene = Scene("p0", "d0", clock=lambda: now)
    scene.dispatch()
    scene.say("p0", first(1, 0, 7))
    for index in range(1, 8):
        now += 0.2 * membership.SILENCE
        scene.say("d0", tokens(1, index, 8))
        scene.dispatcher._members.watch()
    assert scene.ids() == {"d0"}


def test_drain_asks_the_worker_and_gives_it_nothing_new() -> None:
    scene = Scene("p0", "p1", "d0")
    assert scene.dispatcher.drain("p0")["state"] == "leaving"
    assert scene.wire.to("p0", Drain) == [Drain()]
    scene.dispatch()
    assert not scene.wire.to("p0", PrefillRequest)
    with pytest.raises(WorkerNotFoundError, match="p9"):
        scene.dispatcher.drain("p9")


def test_a_worker_that_changes_its_role_ends_what_it_has_or_gives_it_up() -> None:
    scene = Scene("p0", "p1", "d0", "d1")
    running = scene.dispatch()
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", Leaving(next_role="prefill"))
    assert states(scene)["d0"] == ("decode", "draining", "prefill")
    scene.say("d0", tokens(1, 1, 8))
    scene.say("d0", Left(next_role="prefill"))
    assert states(scene)["d0"] == ("decode", "flipping", "prefill")
    [again] = [m for m in scene.wire.all(PrefillRequest) if m.request_id == "r#2"]
    assert again.token_ids == [1, 2, 3, 7, 8]
    assert again.decode.worker_id == "d1"
    scene.say("d0", registration("d0", epoch=2, session=1).model_copy(update={"role": "prefill"}))
    assert states(scene)["d0"] == ("prefill", "serving", None)
    assert scene.wire.to("d0", Registered)
    assert output(running) == [7, 8]
    assert scene.count("request_retries", reason="worker_left") == 1


def test_a_role_that_ends_unannounced_loses_its_work_to_others() -> None:
    scene = Scene("p0", "p1", "d0", "d1")
    scene.dispatch()
    scene.say("p0", Leaving(next_role="decode"))  # and then it was not heard for a while
    scene.say("p0", registration("p0", epoch=2, session=1).model_copy(update={"role": "decode"}))
    assert [m.request_id for m in scene.wire.all(PrefillRequest)] == ["r#1", "r#2"]


def test_a_leaving_worker_ends_what_it_has_and_takes_nothing_new() -> None:
    scene = Scene("p0", "d0")
    running = scene.dispatch()
    scene.say("d0", Leaving())
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8))
    assert output(running) == [7, 8]
    with pytest.raises(UnavailableError, match="no decode worker"):
        scene.dispatch()


@pytest.mark.parametrize("worker", ["p0", "d0"])
def test_a_message_that_was_lost_on_its_way_ends_the_workers_session(worker: str) -> None:
    scene = Scene("p0", "d0")
    running = scene.dispatch()
    scene.say("p0", first(1, 0, 7))
    scene.say("d0", tokens(1, 1, 8))
    scene.beat(worker)
    assert not scene.wire.to(worker, RegisterAgain)
    scene.num_said[worker] += 1  # and it never came
    scene.beat(worker)
    assert scene.wire.to(worker, RegisterAgain)
    assert scene.ids() == {"p0", "d0"} - {worker}
    scene.say(worker, registration(worker, session=1))
    if worker == "d0":  # prefill is not needed any more
        [_, again] = scene.wire.to("p0", PrefillRequest)
        assert again.token_ids == [1, 2, 3, 7, 8]
    scene.beat(worker)
    assert scene.ids() == {"p0", "d0"}
    assert output(running) == [7, 8]


async def test_heartbeats_tell_a_worker_how_much_it_must_have_received() -> None:
    scene = Scene("p0", "d0")
    scene.dispatch()
    async with serving(scene):
        await until(scene, lambda: bool(scene.wire.to("p0", RouterHeartbeat)), "p0", "d0")
    assert RouterHeartbeat(num_sent=1) in scene.wire.to("p0", RouterHeartbeat)
    assert RouterHeartbeat(num_sent=0) in scene.wire.to("d0", RouterHeartbeat)
