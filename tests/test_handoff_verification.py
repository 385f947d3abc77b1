"""Grants and hand-offs that are forged, replayed, late, foreign or damaged.

Each is refused before the first decode step and counted by reason. Then the request is computed
anew, fails by name, or does not even notice, because the lie was somebody else's.
"""

from __future__ import annotations

from random import Random

import pytest

from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import Accepted, Grant, GrantRefused, Handoff, Message, Revoke
from protocol.sampling import SamplingParams
from tests.handoff_simulation import (
    EPOCH,
    FINGERPRINT,
    Fault,
    Request,
    Setup,
    Simulation,
    outcome,
)

GREEDY = SamplingParams(max_tokens=6)
PROMPT = list(range(10, 21))  # 11 tokens, 3 blocks


def simulate(setup: Setup | None = None, epoch: int = EPOCH) -> tuple[Simulation, Request]:
    simulation = Simulation(setup or Setup(), Random(0))
    return simulation, simulation.submit(PROMPT, GREEDY, epoch=epoch)


def intercept(simulation: Simulation, kind: type[Message]) -> Message:
    """Take a kind of message between the workers off its channel when it arrives."""
    caught: list[Message] = []
    hearing = [(worker, worker.hear) for worker in (simulation.prefill, simulation.decode)]
    for worker, hear in hearing:
        worker.hear = lambda message, hear=hear: (
            caught.append(message) if isinstance(message, kind) else hear(message)
        )
    while not caught:
        simulation.step()
    for worker, _ in hearing:
        del worker.hear
    return caught[0]


def refused(simulation: Simulation) -> dict[str, int]:
    """Hand-offs that decode refused, by reason."""
    return simulation.decode.admission.integrity_failures


# What decode is told --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("grant_id", 9999), ("epoch", EPOCH + 1), ("num_tokens", 12), ("digests", [1])],
)
def test_a_hand_off_on_other_terms_is_refused_by_name(field: str, value: object) -> None:
    simulation, request = simulate()
    handoff = intercept(simulation, Handoff)
    simulation.decode.hear(handoff.model_copy(update={field: value}))
    assert refused(simulation) == {"handoff": 1}
    assert not simulation.decode.scheduler.num_waiting
    simulation.settle()
    assert outcome(request) == "protocol_error"
    assert field in str(request.errors[0])


def test_a_foreign_hand_off_is_not_run() -> None:
    simulation, _ = simulate()
    handoff = intercept(simulation, Handoff)
    simulation.decode.hear(handoff, peer=b"stranger")
    assert not len(simulation.decode.residents)


@pytest.mark.parametrize("peer", [b"prefill", b"stranger"])
def test_a_replayed_hand_off_runs_nothing_twice(peer: bytes) -> None:
    simulation, request = simulate()
    handoff = intercept(simulation, Handoff)
    simulation.decode.hear(handoff)
    while not len(simulation.decode.residents):
        simulation.step()
    stale = simulation.decode.admission.num_stale
    simulation.decode.hear(handoff, peer)
    assert simulation.decode.admission.num_stale - stale == (peer == b"stranger")
    simulation.settle()
    assert outcome(request) == "finished"
    simulation.decode.hear(handoff, peer)
    simulation.settle()
    assert simulation.decode.idle()


def test_a_hand_off_after_its_grant_expired_is_stale() -> None:
    simulation, request = simulate()
    handoff = intercept(simulation, Handoff)
    simulation.tick(60.0)
    assert simulation.decode.admission.num_expired == 1
    simulation.decode.hear(handoff)
    assert simulation.decode.admission.num_stale == 1
    assert not len(simulation.decode.residents)
    simulation.settle()
    assert outcome(request) == "worker_lost"


@pytest.mark.parametrize("field", [*KVGeometry.model_fields, *Fingerprint.model_fields])
def test_a_fingerprint_that_differs_in_one_field_gets_no_grant(field: str) -> None:
    if field == "geometry":
        return  # its fields are
    within = field in KVGeometry.model_fields
    kind = (KVGeometry if within else Fingerprint).model_fields[field].annotation
    other = 99 if kind is int else "float16" if field == "dtype" else "other"
    update: dict[str, object] = {field: other}
    if within:
        update = {"geometry": FINGERPRINT.geometry.model_copy(update=update)}
    theirs = FINGERPRINT.model_copy(update=update)
    simulation, request = simulate(Setup(prefill_fingerprint=theirs))
    simulation.settle()
    assert outcome(request) == "protocol_error"
    assert f"{field}: " in str(request.errors[0])
    assert repr(other) in str(request.errors[0])
    assert refused(simulation) == {"fingerprint": 1}
    assert simulation.decode.pool.prefix_queries == 0  # nothing was even reserved


def test_a_request_to_a_former_incarnation_gets_no_grant() -> None:
    simulation, request = simulate(epoch=EPOCH - 1)
    simulation.settle()
    assert outcome(request) == "worker_lost"
    assert simulation.decode.admission.num_stale >= 1
    assert simulation.decode.pool.prefix_queries == 0


def test_a_foreign_revoke_ends_nothing() -> None:
    simulation, request = simulate()
    grant = intercept(simulation, Grant)
    simulation.decode.hear(Revoke(request_id="r0#1"), peer=b"stranger")
    assert simulation.decode.admission.num_stale == 1
    simulation.prefill.hear(grant)
    simulation.settle()
    assert outcome(request) == "finished"


# What prefill is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", EPOCH + 1), ("num_cached_tokens", 3), ("num_cached_tokens", 4), ("blocks", [0, 1])],
)
def test_a_grant_on_other_terms_fails_the_request(field: str, value: object) -> None:
    simulation, request = simulate()
    grant = intercept(simulation, Grant)
    simulation.prefill.hear(grant.model_copy(update={field: value}))
    simulation.settle()
    assert outcome(request) == "protocol_error"
    assert simulation.decode.plane.counters.messages_received == 0


def test_answers_of_a_worker_that_was_not_asked_change_nothing() -> None:
    simulation, request = simulate()
    grant = intercept(simulation, Grant)
    assert isinstance(grant, Grant)
    other = grant.model_copy(update={"grant_id": 77})
    refusal = GrantRefused(request_id="r0#1", code="overloaded", message="no")
    accepted = Accepted(request_id="r0#1", grant_id=grant.grant_id)
    for answer in (other, refusal, accepted):
        simulation.prefill.hear(answer, "decode-9")
    assert simulation.prefill.handoffs.num_stale == 3
    simulation.prefill.hear(grant)
    simulation.settle()
    assert outcome(request) == "finished"


# What arrives ---------------------------------------------------------------------------------


def test_blocks_under_a_forged_grant_are_refused() -> None:
    simulation, _ = simulate()
    grant = intercept(simulation, Grant)
    assert isinstance(grant, Grant)
    before = simulation.decode.memory.rows.copy()
    simulation.prefill.plane.send_blocks(b"inproc-decode", grant.grant_id + 1, 0, [0], [0])
    while not simulation.decode.plane.counters.refused:
        simulation.step()
    assert simulation.decode.plane.counters.refused == {"unknown_grant": 1}
    assert (simulation.decode.memory.rows == before).all()


@pytest.mark.parametrize(
    ("fault", "eager", "reasons", "end"),
    [
        pytest.param(Fault.CORRUPT, 0.0, {"digest": 1}, "finished", id="flipped-bit"),
        pytest.param(Fault.DROP, 1.0, {"missing": 1}, "finished", id="missing-block"),
        pytest.param(Fault.DROP, 0.0, {}, "worker_lost", id="sender-hears-nothing"),
    ],
)
def test_no_decode_step_sees_a_damaged_or_missing_block(
    fault: Fault, eager: float, reasons: dict[str, int], end: str
) -> None:
    simulation, request = simulate()
    simulation.prefill.plane.transport.eager = eager
    simulation.befall(fault)
    while not simulation.decode.grants:
        simulation.step()
    [grant] = simulation.decode.grants
    while grant in simulation.decode.grants:  # until it is closed, by success or expiry
        assert not simulation.decode.scheduler.running or refused(simulation)
        simulation.tick(0.01)
        simulation.step()
    simulation.settle()
    assert outcome(request) == end
    assert refused(simulation) == reasons
