"""When a request or a hand-off is refused, and in which words. No state."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Terms:
    """What this worker, of this ``epoch``, requires of requests and of hand-offs."""

    pool: BlockPool
    fingerprint: Fingerprint
    epoch: int
    vocab_size: int

    def objection(self, request: GrantRequest) -> KvferryError | None:
        """Why this worker can never take the request; None if it can."""
        if request.epoch != self.epoch:
            return WorkerLostError(f"epoch: {self.epoch} here, {request.epoch} asked for")
        difference = self.fingerprint.difference(request.fingerprint)
        if difference is not None:
            return ProtocolError(f"the workers' KV does not fit: {difference}")
        return self.misfit(request)

    def misfit(self, request: Continuation) -> KvferryError | None:
        """Why the request does not fit this pool and vocabulary; None if it does."""
        unfit = Sequence.of(request).objection()
        if unfit is not None:
            return InvalidRequestError(unfit)
        largest = max(request.token_ids)
        if largest >= self.vocab_size:
            return ProtocolError(f"token id {largest} with a vocabulary of {self.vocab_size}")
        # A sequence alone in the pool must be able to reach its end; its last token needs no KV.
        most_tokens = request.num_prompt_tokens + request.sampling.max_tokens - 1
        needed = self.pool.blocks_for(most_tokens)
        if needed > self.pool.num_blocks:
            message = f"needs {needed} KV blocks, the decode pool has {self.pool.num_blocks}"
            return ContextLengthError(message)
        return None

    def disagreement(self, grant: OpenGrant, handoff: Handoff) -> ProtocolError | None:
        """The first term in which a hand-off differs from its grant; None if it fits."""
        terms = (
            ("grant_id", grant.grant_id, handoff.grant_id),
            ("epoch", self.epoch, handoff.epoch),
            ("num_tokens", grant.sequence.num_tokens, handoff.num_tokens),
            ("digests", len(grant.blocks), len(handoff.digests)),
            ("first_token in the vocabulary", True, handoff.first_token < self.vocab_size),
        )
        for name, expected, found in terms:
            if expected != found:
                message = f"hand-off refused: {name} is {found!r}, expected {expected!r}"
                return ProtocolError(message)
        return None
