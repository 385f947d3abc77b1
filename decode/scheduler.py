"""Which sequences generate in the next step. Pure policy: no tensor, no clock.

Every running sequence computes one token a step. When blocks run out the newest sequence is
preempted: it gives up its blocks and is recomputed later, in chunks, from its token ids; what
is still in the prefix cache then costs nothing. The client never notices.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import count

from engine.batch import Batch, BatchRow
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from engine.step import Step
from protocol.messages import FinishReason


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a step sampled, and whether the sequence ends with it."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class DecodeScheduler:
    """Batches continuously: a sequence joins and leaves between any two steps.

    Sequences with blocks start before preempted ones: those can wait for memory, while a
    handed-off sequence that waits holds it.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        # All oldest first.
        self.admitted: list[Sequence] = []  # hold their prompt's blocks
        self.preempted: list[Sequence] = []  # hold none
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step = Step(pool)
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the running batch."""
        return len(self.admitted) + len(self.preempted)

    @property
    def headroom(self) -> int | None:
        """Blocks a new grant must leave free, or None when newcomers have to wait.

        One for each running sequence to grow into; preempted sequences go before newcomers.
        """
        return None if self.preempted else len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Take over a sequence; one without blocks is computed from its tokens."""
        sequence.arrival = next(self._arrivals)
        if sequence.block_table:
            self.admitted.append(sequence)
        else:
            sequence.recomputed = True
            self.preempted.append(sequence)

    def schedule(self) -> Batch:
        """The next step's rows; empty when nothing may run."""
        self._start_waiting()
        self._make_room()
        budget = self.max_num_batched_tokens  # of recomputed tokens
        rows: list[BatchRow] = []
        for sequence in self.running:
            remaining = sequence.num_tokens - sequence.num_computed
            if remaining == 1:
                rows.append(BatchRow(sequence, sequence.num_computed, 1))
            elif (chunk := min(remaining, budget)) > 0:
                rows.append(BatchRow(sequence, sequence.num_computed, chunk))
                budget -= chunk
        return self._step.begin(rows)

    def commit(self, token_ids: list[int]) -> list[NewToken]:
        """Record the step that has run; finished sequences leave and give up their blocks."""
        news: list[NewToken] = []
        for row, token_id in self._step.end(token_ids):
            if token_id is None:
                continue
            reason = row.sequence.finish_reason()
            if reason is not None:
                self.running.remove(row.sequence)
                self.pool.release_sequence(row.sequence)
            news.append(NewToken(row.sequence, token_id, reason))
        return news

    def cancel(self, request_id: str) -> None:
        """Drop a sequence. One in the running step gives up its blocks when that step ends."""
        for queue in (self.admitted, self.preempted, self.running):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    self._step.drop(sequence)
                    return

    def owned_blocks(self) -> list[list[int]]:
        """Block lists this scheduler owns, for ``BlockPool.check_integrity``."""
        held = [s.block_table for s in (*self.admitted, *self.running)]
        return held + self._step.owned_blocks()

    def _start_waiting(self) -> None:
        while self.admitted and len(self.running) < self.max_num_seqs:
            self._run(self.admitted.pop(0))
        while self.preempted and len(self.running) < self.max_num_seqs:
            sequence = self.preempted[0]
            if not self.pool.reserve(sequence, max_cached_tokens=sequence.num_tokens - 1):
                return
            self._run(self.preempted.pop(0))

    def _run(self, sequence: Sequence) -> None:
        insort(self.running, sequence, key=_arrival)

    def _make_room(self) -> None:
        """Give every running sequence a slot for its next token, oldest first."""
        served = 0
        while served < len(self.running):
            if self.pool.grow(self.running[served], self.running[served].num_tokens):
                served += 1
            else:
                self._preempt((self.admitted or self.running).pop())

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release_sequence(sequence)
        sequence.recomputed = True
        insort(self.preempted, sequence, key=_arrival)
        self.num_preemptions += 1
