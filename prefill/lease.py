"""One hand-off of a prefill worker: whose it is and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.sequence import Sequence
from protocol.geometry import Fingerprint
from protocol.messages import Grant, GrantRequest, Handoff, PeerAddress

FIRST_REPEAT = 1.0  # seconds without an answer of decode until the question is repeated
LAST_REPEAT = 8.0  # it doubles up to here


class LeaseState(Enum):
    """Where a hand-off stands; ``prefill.handoff`` has the transitions."""

    QUEUED = auto()
    ASKED = auto()
    AHEAD = auto()
    SHIPPING = auto()
    DRAINING = auto()
    OFFERED = auto()


@dataclass(slots=True, eq=False)
class Lease:
    """One request's hand-off."""

    sequence: Sequence
    router_id: str
    decode: PeerAddress
    deadline: float
    state: LeaseState = LeaseState.QUEUED
    grant: Grant | None = None
    num_shipped: int = 0  # grant positions given to the transport
    digests: dict[int, int] = field(default_factory=dict)  # by grant position
    repeat_at: float = 0.0  # when a question that decode has not answered is repeated
    repeat_after: float = FIRST_REPEAT

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.sequence.request_id

    @property
    def owns_blocks(self) -> bool:
        """Whether the sequence's blocks are the lease's; before, they are the scheduler's."""
        return self.state in (LeaseState.AHEAD, LeaseState.DRAINING, LeaseState.OFFERED)

    def enter(self, state: LeaseState, now: float) -> None:
        """Go on to a state in which decode owes an answer."""
        self.state, self.repeat_after = state, FIRST_REPEAT
        self.repeat_at = now + FIRST_REPEAT

    def question(self, fingerprint: Fingerprint, now: float) -> GrantRequest | Handoff:
        """What decode owes an answer to: to be sent on entering the state, and repeated."""
        sequence, grant = self.sequence, self.grant
        if grant is None:
            return GrantRequest(
                request_id=self.request_id,
                router_id=self.router_id,
                epoch=self.decode.epoch,
                token_ids=sequence.token_ids[: sequence.num_given_tokens],
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=sequence.sampling,
                cache_salt=sequence.cache_salt,
                priority=sequence.priority,
                fingerprint=fingerprint,
                timeout=max(0.0, self.deadline - now),
            )
        return Handoff(
            request_id=self.request_id,
            grant_id=grant.grant_id,
            epoch=grant.epoch,
            first_token=sequence.token_ids[-1],
            num_tokens=sequence.num_given_tokens,
            digests=[self.digests[position] for position in range(len(grant.blocks))],
        )

    def take_unshipped(self, block_size: int) -> tuple[int, list[int], list[int]]:
        """What can be sent from now on: first grant position, blocks here, blocks in decode.

        Blocks that are complete, and once all is computed the last, partly filled one.
        """
        first, grant, sequence = self.num_shipped, self.grant, self.sequence
        if grant is None:
            return first, [], []
        all_computed = self.state is LeaseState.DRAINING
        complete = sequence.num_computed // block_size
        last = len(sequence.block_table) if all_computed else complete
        skipped = grant.num_cached_tokens // block_size
        self.num_shipped = max(first, last - skipped)
        source = sequence.block_table[skipped + first : skipped + self.num_shipped]
        return first, source, grant.blocks[first : self.num_shipped]

    def must_repeat(self, now: float) -> bool:
        """Whether the answer that decode owes is overdue; then the next one has twice the time."""
        if now < self.repeat_at:
            return False
        self.repeat_after = min(2 * self.repeat_after, LAST_REPEAT)
        self.repeat_at = now + self.repeat_after
        return True
