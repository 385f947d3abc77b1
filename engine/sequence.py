"""A request's live state on a worker: its tokens and the blocks that hold their KV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from protocol.messages import Continuation, FinishReason
from protocol.sampling import SamplingParams, TokenLogprobs

Blocks = NDArray[np.int32]

MAX_LOGPROBS = 4_000_000  # entries of up to 16 bytes on the wire, in a message of 64 MiB


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """Tokens, blocks and progress of one request. Owned by one scheduler at a time.

    ``token_ids`` holds prompt then output, of which other workers may have generated a part.
    ``block_table[i]`` holds the KV of tokens [i * block_size, (i + 1) * block_size). It grows at
    its end; other blocks are another list.
    ``num_computed`` tokens have their KV written.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as known
    cache_salt: str = ""  # of the hashes
    priority: int = 0  # the lower, the earlier
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache when its blocks were reserved
    arrival: int = 0  # order of admission on this worker
    recomputed: bool = False  # KV that existed before is computed again here
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens 1, 2, ...
    num_given_tokens: int = field(init=False)  # known when the sequence came to this worker
    _copied_table: list[int] | None = field(default=None, init=False, repr=False)
    _copy: Blocks = field(init=False, repr=False)  # of its first _num_copied entries, then room
    _num_copied: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_given_tokens = len(self.token_ids)
        self._copy = np.empty(0, np.int32)

    @classmethod
    def of(cls, request: Continuation) -> Self:
        """The sequence that a request begins or goes on with, without blocks."""
        return cls(
            request.request_id,
            request.token_ids,
            request.num_prompt_tokens,
            request.sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )

    @property
    def turn(self) -> tuple[int, int]:
        """By which a scheduler orders what waits: the smallest is the next."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, by whichever worker."""
        return len(self.token_ids) - self.num_prompt_tokens

    def all_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """What comes with the first output token: every prompt token's, None for the first one.

        None when they are not wanted, or a former worker has told them.
        """
        if self.sampling.prompt_logprobs is None or self.num_output_tokens != 1:
            return None
        return [None, *self.prompt_logprobs]

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt's logprobs are wanted, for which all of the prompt is computed."""
        return self.sampling.prompt_logprobs is not None and self.num_output_tokens == 0

    @property
    def num_cacheable(self) -> int:
        """Tokens whose KV may come from a cache: computing the last one gives the next."""
        return 0 if self.scores_prompt else self.num_tokens - 1

    def objection(self) -> str | None:
        """Why no worker can compute its tokens; None if one can."""
        if not self.token_ids:
            return "the prompt is empty"
        entries = self.num_tokens * (3 + (self.sampling.prompt_logprobs or 0))  # a token: three
        if self.scores_prompt and entries > MAX_LOGPROBS:
            return f"prompt_logprobs of {self.num_tokens} tokens do not fit a message"
        return None

    def blocks(self) -> Blocks:
        """The block table as an array; a call copies only what has come since the last one."""
        table = self.block_table
        if table is not self._copied_table:
            self._copied_table, self._num_copied = table, 0
        if len(table) > len(self._copy):
            self._copy = np.resize(self._copy, 2 * len(table))
        if self._num_copied < len(table):
            self._copy[self._num_copied : len(table)] = table[self._num_copied :]
            self._num_copied = len(table)
        return self._copy[: len(table)]

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its newest token: "stop", "length" or None (it goes on)."""
        if self.num_output_tokens == 0:
            return None
        stops = self.token_ids[-1] in self.sampling.stop_token_ids
        # A grammar may leave nothing but the end before ``min_tokens``.
        ended = self.sampling.grammar is not None
        if stops and (ended or self.num_output_tokens >= self.sampling.min_tokens):
            return "stop"
        if self.num_output_tokens >= self.sampling.max_tokens:
            return "length"
        return None
