"""What a scheduler hands to the engine, rows of sequence and token count, and what comes back.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.sequence import Sequence
from protocol.sampling import TokenLogprobs


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

    @property
    def scored_tokens(self) -> list[int]:
        """The prompt tokens after this row's first ones, if their logprobs are wanted."""
        sequence = self.sequence
        if not sequence.scores_prompt:
            return []
        return sequence.token_ids[self.start + 1 : self.end + 1]


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


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave. What only some requests ask for is found by their ids."""

    token_ids: list[int]  # one for each sampling row, in order
    logprobs: Mapping[str, TokenLogprobs] = field(default_factory=dict)  # of those tokens
    prompt_logprobs: Mapping[str, list[TokenLogprobs]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)  # why the sampled token is void
