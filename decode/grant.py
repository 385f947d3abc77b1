"""One grant of a decode worker: whose it is, what it reserves, how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.sequence import Sequence
from protocol.errors import DeadlineError, KvferryError, WorkerLostError
from protocol.messages import Grant, Handoff


class GrantState(Enum):
    """Where a grant stands; ``decode.admission`` draws the transitions."""

    PENDING = auto()
    OPEN = auto()
    CLOSING = auto()


@dataclass(slots=True, eq=False)
class OpenGrant:
    """One request's reservation. ``sequence.block_table`` holds the reserved blocks."""

    grant_id: int
    peer: bytes
    router_id: str
    sequence: Sequence
    deadline: float
    expires: float
    state: GrantState = GrantState.PENDING
    blocks: list[int] = field(default_factory=list)  # destinations, without the cached prefix
    digests: dict[int, int] = field(default_factory=dict)  # of received blocks, by position
    handoff: Handoff | None = None

    def message(self, epoch: int, now: float) -> Grant:
        """What prefill is told of it."""
        return Grant(
            request_id=self.sequence.request_id,
            grant_id=self.grant_id,
            epoch=epoch,
            num_cached_tokens=self.sequence.num_computed,
            blocks=self.blocks,
            expires_in=self.expires - now,
        )

    def expiry(self, now: float) -> KvferryError:
        """Why the grant ends at its expiry."""
        if now >= self.deadline:
            state = self.state.name.lower()
            return DeadlineError(f"the request's deadline passed in decode ({state})")
        return WorkerLostError("prefill sent nothing under its grant for too long")


def without_blocks(sequence: Sequence) -> Sequence:
    """The same request, to be computed from its tokens."""
    return Sequence(
        sequence.request_id,
        list(sequence.token_ids),
        sequence.num_prompt_tokens,
        sequence.sampling,
        cache_salt=sequence.cache_salt,
    )
