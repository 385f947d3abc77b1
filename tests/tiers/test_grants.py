"""A grant of which a tier fills the first block: what it tells prefill, and what it waits for."""

from __future__ import annotations

from itertools import count, permutations

import pytest

from decode import admission_events as adm
from decode.admission import Admission
from engine.block_pool import BlockPool
from protocol.messages import Grant, GrantRequest, Handoff
from protocol.sampling import SamplingParams
from tests.fake_model import VOCAB
from tests.handoff_simulation import EPOCH, FINGERPRINT

BLOCK = FINGERPRINT.geometry.block_size
PEER = b"prefill"
TOKENS = list(range(2 * BLOCK + 1))  # three blocks


def opened() -> tuple[Admission, BlockPool, list[adm.Action]]:
    """A request that got its grant at once, and what followed."""
    pool = BlockPool(8, BLOCK)
    admission = Admission(
        pool,
        FINGERPRINT,
        EPOCH,
        vocab_size=VOCAB,
        headroom=lambda: 0,
        new_grant_id=count(1).__next__,
    )
    admission.room.loadable = lambda sequence: 1
    request = GrantRequest(
        request_id="r",
        token_ids=TOKENS,
        num_prompt_tokens=len(TOKENS),
        sampling=SamplingParams(max_tokens=4),
        timeout=100.0,
        router_id="router",
        epoch=EPOCH,
        fingerprint=FINGERPRINT,
    )
    return admission, pool, admission.handle(adm.FromPeer(PEER, request), 0.0)


def event(name: str, num_loaded: int) -> adm.Event:
    match name:
        case "load":
            return adm.Loaded(1, num_loaded)
        case "receive":
            return adm.Received(1, 0, [7, 8])
        case _:
            handoff = Handoff(
                request_id="r",
                grant_id=1,
                epoch=EPOCH,
                first_token=1,
                num_tokens=len(TOKENS),
                digests=[7, 8],
            )
            return adm.FromPeer(PEER, handoff)


def test_prefill_is_asked_for_the_other_blocks_only() -> None:
    admission, _, (load, receive, reply) = opened()
    grant = admission.grants.of_request("r")
    assert grant is not None
    assert load == adm.LoadBlocks(1, grant.sequence, 1)
    assert receive == adm.OpenReceive(1, grant.sequence.block_table[1:], PEER)
    assert isinstance(reply, adm.Reply)
    assert isinstance(reply.message, Grant)
    assert (reply.message.num_cached_tokens, len(reply.message.blocks)) == (BLOCK, 2)


@pytest.mark.parametrize("order", [*permutations(("load", "receive", "hand off"))])
@pytest.mark.parametrize("num_loaded", [1, 0])
def test_a_sequence_runs_once_everything_has_come(order: tuple[str, ...], num_loaded: int) -> None:
    admission, pool, _ = opened()
    for name in order[:2]:
        assert admission.handle(event(name, num_loaded), 0.0) == []
    close, admit, _ = admission.handle(event(order[2], num_loaded), 0.0)
    assert close == adm.CloseReceive(1)
    assert isinstance(admit, adm.Admit)
    sequence = admit.sequence
    assert sequence.token_ids == [*TOKENS, 1]
    assert len(sequence.block_table) == (3 if num_loaded else 0)  # else it is computed
    assert sequence.num_computed == (len(TOKENS) if num_loaded else 0)
    assert not admission.integrity_failures
    pool.check_integrity([sequence.block_table, *admission.grants.owned_blocks()])
    assert admission.handle(adm.Closed(1), 0.0) == []
    assert pool.num_used == len(sequence.block_table)


def test_a_load_that_never_ends_is_not_waited_for() -> None:
    admission, _, _ = opened()
    admission.handle(event("receive", 0), 0.0)
    admission.handle(event("hand off", 0), 1.0)
    assert admission.handle(adm.Tick(), 2.9) == []
    _, admit, _ = admission.handle(adm.Tick(), 3.0)
    assert isinstance(admit, adm.Admit)
    assert not admit.sequence.block_table
    assert admission.handle(event("load", 1), 4.0) == []  # it is over
