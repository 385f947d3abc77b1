"""A model whose KV can be computed by hand, over a KV memory that remembers what was written.

The KV of a token is a number that depends on the token and the KV before it, as read from the
blocks; the next token depends on the KV of all tokens, as read from the blocks. A block that was
never filled, filled twice, or that holds another sequence's KV therefore changes the output.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.batch import Batch
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

VOCAB = 1000
UNWRITTEN = -1


def kv_of(token_ids: Iterable[int]) -> list[int]:
    """The KV of each token of a sequence."""
    kv: list[int] = []
    for token_id in token_ids:
        kv.append(hash((kv[-1] if kv else 0, token_id)))
    return kv


def next_token(kv: Iterable[int]) -> int:
    """The token after those whose KV is given."""
    return hash(tuple(kv)) % VOCAB


def generate(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """What a request must yield, whoever computes it."""
    sequence = Sequence("reference", list(prompt), len(prompt), sampling)
    while sequence.finish_reason() is None:
        sequence.token_ids.append(next_token(kv_of(sequence.token_ids)))
    return sequence.token_ids[len(prompt) :]


class Memory:
    """One worker's KV: ``rows [num_blocks, block_size]``."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.rows = np.full((num_blocks, block_size), UNWRITTEN, np.int64)

    def run(self, batch: Batch) -> list[int]:
        """Compute the batch's rows: one new token for each sampling row, in order."""
        sampled: list[int] = []
        for row in batch.rows:
            sequence = row.sequence
            for position in range(row.start, row.end):
                before = self._read(sequence, position - 1) if position else 0
                block, slot = self._slot(sequence, position)
                self.rows[block, slot] = hash((before, sequence.token_ids[position]))
            if row.samples:
                sampled.append(next_token(self._read(sequence, i) for i in range(row.end)))
        return sampled

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def _read(self, sequence: Sequence, position: int) -> int:
        kv: int = self.rows.item(self._slot(sequence, position))
        return kv
