"""A request's live state on a worker: its tokens and the blocks that hold their KV."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages import FinishReason
from protocol.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, blocks and progress of one request. Owned by one scheduler at a time.

    ``token_ids`` holds prompt then output. ``block_table[i]`` holds the KV of tokens
    [i * block_size, (i + 1) * block_size). ``num_computed`` tokens have their KV written.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as known
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache when its blocks were reserved
    arrival: int = 0  # order of admission on this worker
    recomputed: bool = False  # its prompt is computed again here, after it lost its blocks

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, by whichever worker."""
        return len(self.token_ids) - self.num_prompt_tokens

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its newest token: "stop", "length" or None (it goes on)."""
        if self.num_output_tokens == 0:
            return None
        stops = self.token_ids[-1] in self.sampling.stop_token_ids
        if stops and self.num_output_tokens >= self.sampling.min_tokens:
            return "stop"
        if self.num_output_tokens >= self.sampling.max_tokens:
            return "length"
        return None
