"""Which sequences generate in the next step. Pure policy: no tensor, no clock.

Every running sequence that generates computes one token a step. Prompts that decode computes
itself go in chunks beside them, under one token budget. When blocks run out the sequence of the
least priority, of those the newest, is preempted: it gives up its blocks and is recomputed later,
in chunks too, from its token ids; what is still in the prefix cache then costs nothing. The client
never notices.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import count
from operator import attrgetter

from engine.batch import Batch, BatchRow
from engine.block_pool import BlockPool
from engine.chunks import Chunks, chunks
from engine.sequence import Sequence
from engine.step import Step
from engine.token_budget import prompt_budget
from protocol.messages import FinishReason

_turn = attrgetter("turn")


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a step sampled, and whether the sequence ends with it."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None


class DecodeScheduler:
    """Batches continuously: a sequence joins and leaves between any two steps.

    Sequences with blocks start before preempted ones: those can wait for memory, while an
    admitted sequence that waits holds it.

    Of a step's ``max_num_batched_tokens`` those that generate take one each and prompts the rest,
    which is at least half: neither starves the other.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        # All by their turns: by priority, then oldest first.
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
    def waiting_tokens(self) -> int:
        """Tokens still to compute of prompts and of what was preempted."""
        waiting = (*self.admitted, *self.preempted, *self.running)
        left = (sequence.num_tokens - sequence.num_computed for sequence in waiting)
        return sum(tokens for tokens in left if tokens > 1)

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
            insort(self.admitted, sequence, key=_turn)
        else:
            sequence.recomputed = True
            insort(self.preempted, sequence, key=_turn)

    def schedule(self) -> Batch:
        """The next step's rows; empty when nothing may run."""
        self._start_waiting()
        self._make_room()
        prompts = self._chunks()
        return self._step.begin(
            [
                BatchRow(sequence, sequence.num_computed, num_tokens)
                for sequence in self.running
                if (num_tokens := prompts.get(sequence, 1)) > 0
            ]
        )

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
            num_cached = sequence.num_cached
            if not self.pool.reserve(sequence, max_cached_tokens=sequence.num_cacheable):
                return
            sequence.num_cached = num_cached  # what it computed itself was no hit
            self._run(self.preempted.pop(0))

    def _chunks(self) -> Chunks:
        """Tokens of the next step for each running sequence that lacks more than one."""
        prompts = [s for s in self.running if s.num_tokens - s.num_computed > 1]
        prompts.sort(key=attrgetter("arrival"))  # priorities count no more: nobody starves
        for sequence in prompts:
            self.pool.adopt(sequence)
        left = {sequence: sequence.num_tokens - sequence.num_computed for sequence in prompts}
        budget = prompt_budget(self.max_num_batched_tokens, len(self.running) - len(left))
        return chunks(left, budget, self.pool.block_size)

    def _run(self, sequence: Sequence) -> None:
        insort(self.running, sequence, key=_turn)

    def _make_room(self) -> None:
        """Give every running sequence a slot for its next token, in the order of their turns."""
        served = 0
        while served < len(self.running):
            if self.pool.grow(self.running[served], self.running[served].num_tokens):
                served += 1
                continue
            queue = self._least()
            self._preempt(queue.pop())
            if queue is self.running and self.admitted:  # the next one has the place, and its turn
                self._run(self.admitted.pop(0))
                served = 0

    def _least(self) -> list[Sequence]:
        """The queue whose last sequence is to give up its blocks; rather one that does not run."""
        waits = self.admitted and self.admitted[-1].priority >= self.running[-1].priority
        return self.admitted if waits else self.running

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release_sequence(sequence)
        sequence.recomputed = True
        if sequence.scores_prompt:  # all of the prompt is computed again
            sequence.prompt_logprobs.clear()
        insort(self.preempted, sequence, key=_turn)
        self.num_preemptions += 1
