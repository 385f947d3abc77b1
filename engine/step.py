"""The step that the engine runs at this moment, as both schedulers see it. Imports no torch."""

from __future__ import annotations

from engine.batch import Batch, BatchRow
from engine.block_pool import BlockPool
from engine.sequence import Sequence


class Step:
    """Fences the blocks of a running batch: one dropped meanwhile is freed when the step ends."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._batch = Batch(())
        self._dropped: list[Sequence] = []

    def begin(self, rows: list[BatchRow]) -> Batch:
        """Make the rows the running batch."""
        self._batch = Batch(tuple(rows))
        return self._batch

    def drop(self, sequence: Sequence) -> None:
        """Free a sequence's blocks, now or, if the engine may be using them, at ``end``."""
        if any(row.sequence is sequence for row in self._batch.rows):
            self._dropped.append(sequence)
        else:
            self._pool.release_sequence(sequence)

    def end(self, token_ids: list[int]) -> list[tuple[BatchRow, int | None]]:
        """Record the batch as computed: each row that was not dropped and the token it sampled.

        ``token_ids`` has one token for each of the batch's sampling rows, in order; it is
        appended to its sequence.
        """
        sampled = iter(token_ids)
        outcome: list[tuple[BatchRow, int | None]] = []
        for row in self._batch.rows:
            token_id = next(sampled) if row.samples else None
            if any(row.sequence is sequence for sequence in self._dropped):
                continue
            row.sequence.num_computed = row.end
            self._pool.publish(row.sequence, row.start)
            if token_id is not None:
                row.sequence.token_ids.append(token_id)
            outcome.append((row, token_id))
        for sequence in self._dropped:
            self._pool.release_sequence(sequence)
        self._dropped, self._batch = [], Batch(())
        return outcome

    def owned_blocks(self) -> list[list[int]]:
        """Block lists of dropped sequences that the engine may still use."""
        return [sequence.block_table for sequence in self._dropped]
