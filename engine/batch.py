"""What a scheduler hands to the engine: rows of sequence and token count. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One sequence's share of a step: compute tokens [start, start + num_tokens)."""

    sequence: Sequence
    start: int  # tokens of the sequence whose KV is already in its blocks
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens whose KV exists once the step has run."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether this row reaches the last known token and so yields a new one."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Rows keep the scheduler's order; a sequence appears at most once."""

    rows: tuple[BatchRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampling_rows(self) -> tuple[BatchRow, ...]:
        """The rows that yield a token, in order."""
        return tuple(row for row in self.rows if row.samples)
