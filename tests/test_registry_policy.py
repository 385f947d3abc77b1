"""Which workers the router knows, and which of them serve a request."""

from __future__ import annotations

from collections.abc import Set

import pytest

from protocol.errors import UnavailableError
from protocol.geometry import Fingerprint, KVGeometry
from protocol.lateness import MIN_LOOKS
from protocol.messages import Heartbeat, Register, Role, WorkerLoad
from router.capacity import Demand
from router.policy import check_serving, choose_pair
from router.registry import Assignment, Registry, Worker
from router.worker_states import WorkerState

TIMEOUT = 3.0
SMALL = Demand(num_tokens=4, expected_tokens=8)
LOAD = WorkerLoad(max_num_seqs=8, total_blocks=99, free_blocks=99)
GEOMETRY = KVGeometry(num_kv_heads=1, num_layers=1, block_size=4, head_dim=4, dtype="float32")


def registration(
    worker_id: str, role: Role = "prefill", epoch: int = 1, weights: str = "00", session: int = 0
) -> Register:
    return Register(
        worker_id=worker_id,
        epoch=epoch,
        session=session,
        role=role,
        model="m",
        fingerprint=Fingerprint(weights_digest=weights, rope="none", geometry=GEOMETRY),
        vocab_size=10,
        max_model_len=100,
        pid=1,
        host="h",
        control="c",
        data=b"",
        transport="t",
        metrics="",
        load=LOAD,
    )


def given(num_tokens: int) -> Assignment:
    return Assignment(num_tokens, num_tokens, begun=True, prompt_tokens=num_tokens)


def chosen(registry: Registry, avoid: Set[str] = frozenset()) -> tuple[str, str]:
    pair = choose_pair(registry, SMALL, avoid)
    assert pair is not None
    return pair.prefill.worker_id, pair.decode.worker_id


def join(registry: Registry, info: Register, now: float = 0.0) -> Worker:
    registry.register(info.worker_id.encode(), info, now)
    worker = registry.get(info.worker_id.encode())
    assert worker is not None
    return worker


def test_a_repeated_registration_keeps_what_the_worker_holds() -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p"))
    worker.give("r", given(5))
    assert registry.register(b"p", registration("p"), 1.0) == []
    assert registry.get(b"p") is worker
    assert worker.assigned_tokens == 5
    assert worker.last_seen == 1.0


@pytest.mark.parametrize("news", [{"epoch": 2}, {"session": 1}])
def test_a_new_epoch_or_session_replaces_the_worker_and_its_state(news: dict[str, int]) -> None:
    registry = Registry(TIMEOUT)
    old = join(registry, registration("p"))
    old.give("r", given(5))
    assert registry.register(b"p", registration("p", **news), 1.0) == [old]
    new = registry.get(b"p")
    assert new is not None
    assert new.assigned == {}
    assert registry.all() == [new]


def test_a_worker_that_comes_back_under_another_link_identity_replaces_itself() -> None:
    registry = Registry(TIMEOUT)
    old = join(registry, registration("p"))
    assert registry.register(b"q", registration("p", epoch=2), 1.0) == [old]
    assert registry.get(b"p") is None
    assert [worker.peer for worker in registry.all()] == [b"q"]


def test_another_worker_under_the_same_link_identity_replaces_the_first() -> None:
    registry = Registry(TIMEOUT)
    old = join(registry, registration("p"))
    assert registry.register(b"p", registration("other", epoch=2), 1.0) == [old]
    assert [worker.worker_id for worker in registry.all()] == ["other"]


def test_heartbeats_keep_alive_and_silence_loses() -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p"))
    load = WorkerLoad(num_running=3)
    assert registry.heartbeat(
        b"p", Heartbeat(epoch=1, load=load, num_sent=0, num_received=0), now=2.0
    )
    assert worker.load == load
    assert registry.expire(now=2.0 + TIMEOUT) == []
    assert registry.expire(now=2.1 + TIMEOUT) == [worker]
    assert registry.expire(now=99.0) == []
    assert registry.all() == []


@pytest.mark.parametrize("pause", [1.0, 100.0])  # in every one of its looks, or in a single one
def test_the_routers_own_lateness_is_nobodys_silence(pause: float) -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p"))
    lost = [registry.expire(pause * look) for look in range(MIN_LOOKS + 2)]
    assert lost == [*[[]] * (MIN_LOOKS + 1), [worker]]  # before, heartbeats may wait to be read


def test_a_worker_that_is_heard_in_a_pause_is_not_heard_in_the_future() -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p"))
    registry.expire(now=1.0)
    registry.heartbeat(b"p", Heartbeat(epoch=1, load=LOAD, num_sent=0, num_received=0), now=99.0)
    assert registry.expire(now=100.0) == []
    assert worker.last_seen == 100.0


def test_heartbeats_of_strangers_and_of_former_epochs_do_not_count() -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p", epoch=2))
    assert not registry.heartbeat(
        b"x", Heartbeat(epoch=1, load=LOAD, num_sent=0, num_received=0), now=2.0
    )
    assert not registry.heartbeat(
        b"p", Heartbeat(epoch=1, load=LOAD, num_sent=0, num_received=0), now=2.0
    )
    assert worker.last_seen == 0.0


def test_a_leaving_worker_takes_no_new_requests_even_if_it_registers_again() -> None:
    registry = Registry(TIMEOUT)
    worker = join(registry, registration("p"))
    registry.leave(b"p")
    registry.leave(b"unknown")
    registry.register(b"p", registration("p"), 1.0)
    assert worker.state is WorkerState.LEAVING
    assert registry.serving("prefill") == []
    assert registry.all() == [worker]


def test_the_least_loaded_pair_is_chosen() -> None:
    registry = Registry(TIMEOUT)
    for name in ("p0", "p1", "p2"):
        join(registry, registration(name)).give(name, given(10))
    for name in ("d0", "d1"):
        join(registry, registration(name, "decode")).give("x", given(1))
    workers = {worker.worker_id: worker for worker in registry.all()}
    workers["p1"].end("p1")
    workers["p1"].give("a", given(2))
    workers["p1"].give("b", given(3))  # two prompts, but the fewest tokens
    workers["d1"].end("x")
    assert chosen(registry) == ("p1", "d1")


def test_equally_busy_decode_workers_are_told_apart_by_their_blocks() -> None:
    registry = Registry(TIMEOUT)
    join(registry, registration("p"))
    for name, free in (("d0", 1), ("d1", 5)):
        worker = join(registry, registration(name, "decode"))
        worker.report(WorkerLoad(max_num_seqs=8, total_blocks=9, free_blocks=free))
    assert chosen(registry) == ("p", "d1")


def test_avoided_workers_are_taken_only_where_there_are_no_others() -> None:
    registry = Registry(TIMEOUT)
    for name in ("p0", "p1"):
        join(registry, registration(name))
    join(registry, registration("d", "decode"))
    for avoid, prefill in (({"p0"}, "p1"), ({"p1", "d"}, "p0"), ({"p0", "p1", "d"}, "p0")):
        assert chosen(registry, avoid) == (prefill, "d")


def test_a_pair_must_fit_together() -> None:
    registry = Registry(TIMEOUT)
    join(registry, registration("p-old", weights="aa"))
    join(registry, registration("p-new", weights="bb")).give("r", given(100))
    join(registry, registration("d-new", "decode", weights="bb"))
    assert chosen(registry) == ("p-new", "d-new")


def test_what_is_missing_is_named() -> None:
    registry = Registry(TIMEOUT)
    with pytest.raises(UnavailableError, match="no prefill worker"):
        check_serving(registry)
    join(registry, registration("p", weights="aa"))
    with pytest.raises(UnavailableError, match="no decode worker"):
        check_serving(registry)
    join(registry, registration("d", "decode", weights="bb"))
    with pytest.raises(UnavailableError, match="weights_digest: 'aa' here, 'bb' there"):
        check_serving(registry)
    assert choose_pair(registry, SMALL) is None
    registry.leave(b"p")
    with pytest.raises(UnavailableError, match="no prefill worker"):
        check_serving(registry)


def test_a_full_pool_is_serving_but_has_no_room() -> None:
    registry = Registry(TIMEOUT)
    join(registry, registration("p"))
    decode = join(registry, registration("d", "decode"))
    decode.report(WorkerLoad(max_num_seqs=1, num_promised=1, total_blocks=9))
    check_serving(registry)
    assert choose_pair(registry, SMALL) is None
