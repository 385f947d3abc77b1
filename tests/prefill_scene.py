"""A prefill scheduler under a model that can be computed by hand; audited after every step."""

from __future__ import annotations

from collections import defaultdict

from engine.batch import Batch, BatchRow
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill.scheduler import PrefillScheduler
from protocol.sampling import SamplingParams
from tests.fake_model import Memory, generate

BLOCK_SIZE = 4
SAMPLING = SamplingParams(max_tokens=5)


class Worker:
    """A scheduler, its pool and an engine. Finished sequences keep their blocks in ``finished``."""

    def __init__(
        self, num_blocks: int = 64, budget: int = 8, max_num_seqs: int = 8, ask_ahead: int = 4
    ) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.memory = Memory(num_blocks, BLOCK_SIZE)
        self.scheduler = PrefillScheduler(
            self.pool,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            ask_ahead=ask_ahead,
        )
        self.finished: dict[str, Sequence] = {}
        self.computed: defaultdict[str, list[int]] = defaultdict(list)  # positions, in order
        self.offered: set[str] = set()
        self.granted: set[str] = set()
        self.ahead: dict[str, int] = {}  # tokens computed before the grant for them
        self.cancelled: set[str] = set()

    def add(self, request_id: str, prompt: list[int], grant: bool = True) -> Sequence:
        sequence = Sequence(request_id, list(prompt), len(prompt), SAMPLING)
        self.scheduler.add(sequence)
        if grant:
            self.grant(request_id)
        return sequence

    def grant(self, request_id: str) -> None:
        self.granted.add(request_id)
        self.ahead.pop(request_id, None)
        self.scheduler.grant(request_id)

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule()
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(batch.rows) <= self.scheduler.max_num_seqs
        for sequence in self.scheduler.prompts_to_offer():
            assert sequence.request_id not in self.granted
            assert sequence.num_tokens - sequence.num_computed <= self.scheduler.ask_ahead
            self.offered.add(sequence.request_id)
        for row in batch.rows:
            assert row.num_tokens > 0
            assert row.sequence.request_id not in self.cancelled
            self.note_ahead(row)
        assert sum(self.ahead.values()) <= self.scheduler.max_num_batched_tokens
        self.check()
        return batch

    def note_ahead(self, row: BatchRow) -> None:
        """Count tokens that are computed without a grant and need one."""
        sequence, ask_ahead = row.sequence, self.scheduler.ask_ahead
        if sequence.request_id in self.granted or sequence.num_tokens - row.end >= ask_ahead:
            return
        assert sequence.request_id in self.offered
        assert sequence.request_id not in self.ahead
        self.ahead[sequence.request_id] = row.num_tokens

    def cancel(self, request_id: str) -> None:
        """No step that is scheduled from now on may run it."""
        self.cancelled.add(request_id)
        self.ahead.pop(request_id, None)
        self.scheduler.cancel(request_id)
        self.check()

    def commit(self, batch: Batch) -> None:
        sampled = self.memory.run(batch)
        for row in batch.rows:
            self.computed[row.sequence.request_id] += range(row.start, row.end)
        for sequence, token_id in self.scheduler.commit(sampled):
            if token_id is not None:
                assert sequence.token_ids[-1] == token_id
                self.finished[sequence.request_id] = sequence
                if sequence.finish_reason() is not None:
                    self.ahead.pop(sequence.request_id, None)
        self.check()

    def step(self) -> Batch:
        batch = self.schedule()
        self.commit(batch)
        return batch

    def release_finished(self) -> None:
        for sequence in self.finished.values():
            if sequence.block_table:
                self.pool.release_sequence(sequence)

    def check(self) -> None:
        finished = [sequence.block_table for sequence in self.finished.values()]
        self.pool.check_integrity([*self.scheduler.owned_blocks(), *finished])


def expected(prompt: list[int]) -> int:
    return generate(prompt, SAMPLING)[0]
