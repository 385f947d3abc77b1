"""A request between its arrival and its end: what the dispatcher and the admission share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from protocol.errors import KvferryError
from router.cached_blocks import PrefixKeys, PromptPrefix, no_prefix
from router.generation import GenerationRequest, TokenChunk
from router.lifecycle import RequestLifecycle
from router.policy import Pair


@dataclass(slots=True, eq=False)
class Running:
    """One request. Its output queue is bounded by its ``max_tokens``."""

    request: GenerationRequest
    lifecycle: RequestLifecycle
    deadline: float
    waiting_since: float  # for its present turn
    pair: Pair | None = None  # of the present attempt
    prefix: PrefixKeys = field(init=False)
    output: asyncio.Queue[TokenChunk | KvferryError] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.prefix = PromptPrefix(self.request.prompt_token_ids, self.request.cache_salt)
        if self.request.sampling.prompt_logprobs is not None:  # then all of it is computed
            self.prefix = no_prefix

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.request.prompt_token_ids) + len(self.lifecycle.token_ids)
