"""How a request's tokens are chosen, as workers see it: token ids and numbers, no text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SamplingParams(BaseModel):
    """Sampling of one sequence. Wire type: frozen, every default resolved by the router.

    The random numbers of a token depend on (seed, position) alone, so a sequence gives the same
    tokens in any batch, after a preemption and on any worker.
    """

    model_config = ConfigDict(frozen=True)

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output tokens
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    seed: int = 0  # unsigned 64 bit
    min_tokens: int = 0  # stop_token_ids are not sampled before this many tokens
    stop_token_ids: tuple[int, ...] = ()  # finish after sampling one of these; holds EOS

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
