"""Which prompts compute how many tokens in the next step. Pure policy: no tensor, no clock.

A prompt waits until the pool has blocks for all of it, so a running one never lacks memory.
What waits starts by priority, then in the order of arrival; ``engine.chunks`` says how those that
run share a step, and there a priority counts no more: nobody holds memory and starves.

The grant for a prompt's last ``ask_ahead`` tokens is asked for (``prompts_to_offer``) when they are
next, and is under way while the step computes that begins then: one step may go ahead of grants,
the next one only when all of those have come. So prefill never outruns decode by more than
``max_num_batched_tokens``, and a prompt does not wait for an answer that takes less than a step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from itertools import count
from operator import attrgetter

from engine.batch import Batch, BatchRow
from engine.block_pool import BlockPool
from engine.chunks import chunks
from engine.sequence import Sequence
from engine.step import Step


class PrefillScheduler:
    """Queues prompts and cuts them into chunks under a token budget.

    A sequence that sampled its first token leaves with its blocks: they pass to the hand-off's
    lease.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        ask_ahead: int | None = None,
    ) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.ask_ahead = 4 * max_num_batched_tokens if ask_ahead is None else ask_ahead
        assert self.ask_ahead > 0, "the last token must wait for its grant"
        self.waiting: list[Sequence] = []  # by their turns
        self.running: list[Sequence] = []  # oldest first
        # Asked before a prompt gets blocks: one that may not start yet is passed over.
        self.may_start: Callable[[Sequence], bool] = lambda _: True
        self._granted: set[str] = set()
        self._ahead: dict[str, Sequence] = {}  # computed, at least in part, before their grants
        self._step = Step(pool)
        self._arrivals = count()

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to compute, the running prompts' included."""
        waiting = sum(sequence.num_tokens for sequence in self.waiting)
        return waiting + sum(s.num_tokens - s.num_computed for s in self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a prompt behind those of its priority."""
        sequence.arrival = next(self._arrivals)
        insort(self.waiting, sequence, key=attrgetter("turn"))

    def grant(self, request_id: str) -> None:
        """Decode has reserved room: the prompt may be finished, if it is not."""
        ahead = self._ahead.pop(request_id, None)
        if ahead is None or ahead in self.running:
            self._granted.add(request_id)

    def prompts_to_offer(self) -> Iterator[Sequence]:
        """Running prompts without a grant whose remainder is at most ``ask_ahead`` tokens.

        To be asked after ``schedule``, which may begin a step ahead of their grants.
        """
        self._start_waiting()
        yield from filter(self._needs_grant, self.running)

    def schedule(self) -> Batch:
        """The next step's rows; empty when nothing may run."""
        self._start_waiting()
        for sequence in self.running:
            self.pool.adopt(sequence)
        ready = {s: tokens for s in self.running if (tokens := self._computable(s)) > 0}
        given = chunks(ready, self.max_num_batched_tokens, self.pool.block_size)
        rows = [BatchRow(s, s.num_computed, n) for s, n in given.items() if n > 0]
        needy = (row.sequence for row in rows if self._needs_grant(row.sequence))
        self._ahead |= {sequence.request_id: sequence for sequence in needy}
        return self._step.begin(rows)

    def commit(self, token_ids: list[int]) -> list[tuple[Sequence, int | None]]:
        """Record the step that has run: each sequence in it and the first token it sampled.

        Sequences cancelled meanwhile are left out. One that sampled has left the scheduler, the
        token appended; its blocks now belong to the caller.
        """
        outcome = [(row.sequence, token_id) for row, token_id in self._step.end(token_ids)]
        for sequence, token_id in outcome:
            if token_id is not None:
                self.running.remove(sequence)
                self._granted.discard(sequence.request_id)
                if sequence.finish_reason() is not None:  # decode is not needed
                    self._ahead.pop(sequence.request_id, None)
        return outcome

    def cancel(self, request_id: str) -> None:
        """Drop a prompt. One in the running step gives up its blocks when that step ends.

        One that has left already and still waits for its grant is forgotten.
        """
        self._granted.discard(request_id)
        self._ahead.pop(request_id, None)
        for queue in (self.waiting, self.running):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    self._step.drop(sequence)
                    return

    def owned_blocks(self) -> list[list[int]]:
        """Block lists this scheduler owns, for ``BlockPool.check_integrity``."""
        return [s.block_table for s in self.running] + self._step.owned_blocks()

    def _start_waiting(self) -> None:
        for sequence in self.waiting[: self.max_num_seqs]:
            if len(self.running) == self.max_num_seqs:
                return
            if not self.may_start(sequence):
                continue
            if not self.pool.reserve(sequence, max_cached_tokens=sequence.num_cacheable):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _needs_grant(self, sequence: Sequence) -> bool:
        """Whether what remains of a running prompt is to be computed only under a grant."""
        remaining = sequence.num_tokens - sequence.num_computed
        return sequence.request_id not in self._granted and remaining <= self.ask_ahead

    def _computable(self, sequence: Sequence) -> int:
        remaining = sequence.num_tokens - sequence.num_computed
        if self._needs_grant(sequence):
            return 0 if self._ahead else remaining
        return remaining if sequence.request_id in self._granted else remaining - self.ask_ahead
