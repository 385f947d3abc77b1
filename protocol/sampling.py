"""How a request's tokens are chosen, as workers see it: token ids, numbers and a grammar."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, model_validator


class Grammar(BaseModel):
    """What the output's text must be. ``protocol.grammar`` says what each kind's text holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str = ""


class TokenLogprobs(BaseModel):
    """How probable a token was: natural logarithms of the softmax of the model's raw logits.

    That is before penalties, bias, grammar, temperature and filters, as vLLM's ``raw_logprobs``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    logprob: float
    rank: int  # 1 is the most probable token
    top: list[tuple[int, float]]  # the most probable token ids, best first, with their logprobs


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
    logit_bias: tuple[tuple[NonNegativeInt, FiniteFloat], ...] = ()  # what tokens' logits gain
    logprobs: NonNegativeInt | None = None  # tell output tokens' and so many alternatives'
    prompt_logprobs: NonNegativeInt | None = None  # the same for the prompt's tokens
    grammar: Grammar | None = None  # with it a stop token is sampled only where the text may end

    @model_validator(mode="after")
    def _can_end(self) -> Self:
        if self.grammar is not None and not self.stop_token_ids:
            raise ValueError("structured output ends with a stop token, and there is none")
        return self

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
