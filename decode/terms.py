"""When a request or a hand-off is refused, and in which words. Pure functions."""

from __future__ import annotations

from decode.grant import OpenGrant
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.errors import (
    ContextLengthError,
    InvalidRequestError,
    KvferryError,
    ProtocolError,
    WorkerLostError,
)
from protocol.geometry import Fingerprint
from protocol.messages import Continuation, GrantRequest, Handoff


def objection(
    request: GrantRequest, pool: BlockPool, fingerprint: Fingerprint, epoch: int, vocab_size: int
) -> KvferryError | None:
    """Why this worker, of this ``epoch``, can never take the request; None if it can."""
    if request.epoch != epoch:
        return WorkerLostError(f"epoch: {epoch} here, {request.epoch} asked for")
    difference = fingerprint.difference(request.fingerprint)
    if difference is not None:
        return ProtocolError(f"the workers' KV does not fit: {difference}")
    return misfit(request, pool, vocab_size)


def misfit(request: Continuation, pool: BlockPool, vocab_size: int) -> KvferryError | None:
    """Why a worker with this pool and vocabulary can never run the request; None if it can."""
    unfit = Sequence.of(request).objection()
    if unfit is not None:
        return InvalidRequestError(unfit)
    largest = max(request.token_ids)
    if largest >= vocab_size:
        return ProtocolError(f"token id {largest} with a vocabulary of {vocab_size}")
    # A sequence alone in the pool must be able to reach its end; its last token needs no KV.
    most_tokens = request.num_prompt_tokens + request.sampling.max_tokens - 1
    needed = pool.blocks_for(most_tokens)
    if needed > pool.num_blocks:
        message = f"needs {needed} KV blocks, the decode pool has {pool.num_blocks}"
        return ContextLengthError(message)
    return None


def disagreement(
    grant: OpenGrant, handoff: Handoff, epoch: int, vocab_size: int
) -> ProtocolError | None:
    """The first term in which a hand-off differs from its grant, as an error; None if it fits."""
    terms = (
        ("grant_id", grant.grant_id, handoff.grant_id),
        ("epoch", epoch, handoff.epoch),
        ("num_tokens", grant.sequence.num_tokens, handoff.num_tokens),
        ("digests", len(grant.blocks), len(handoff.digests)),
        ("first_token in the vocabulary", True, handoff.first_token < vocab_size),
    )
    for name, expected, found in terms:
        if expected != found:
            return ProtocolError(f"hand-off refused: {name} is {found!r}, expected {expected!r}")
    return None
