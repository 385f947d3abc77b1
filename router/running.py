"""A request between its arrival and its end: what the dispatcher and the admission share."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages import Role
from router.cached_blocks import PrefixKeys, PromptPrefix, no_prefix
from router.generation import GenerationRequest
from router.lifecycle import RequestLifecycle
from router.outbox import Outbox
from router.policy import Pair


@dataclass(slots=True, eq=False)
class Running:
    """One request."""

    request: GenerationRequest
    lifecycle: RequestLifecycle
    deadline: float
    waiting_since: float  # for its present turn
    short_before: dict[Role, float] = field(default_factory=dict)  # seconds that pools were short
    pair: Pair | None = None  # of the present attempt
    prompt: PromptPrefix = field(init=False)
    output: Outbox = field(default_factory=Outbox)

    def __post_init__(self) -> None:
        self.prompt = PromptPrefix(self.request.prompt_token_ids, self.request.cache_salt)

    @property
    def prefix(self) -> PrefixKeys:
        """What may be cached of the prompt: nothing where all of it is computed."""
        return self.prompt if self.request.sampling.prompt_logprobs is None else no_prefix

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.request.prompt_token_ids) + len(self.lifecycle.token_ids)
