"""The seam between the router's text half and its dispatch half: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from protocol.messages import Role
from protocol.sampling import SamplingParams, TokenLogprobs
from router.disaggregation import Mode
from router.pools import Pools
from router.timeline import Timeline


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    timeout: float | None = None  # seconds the client gives it, if it says
    client: str = ""  # who asks, among whom the workers are shared fairly
    cache_salt: str = ""  # KV is shared only among requests with the same salt
    priority: int = 0  # the lower, the earlier
    traceparent: str = ""  # the client's W3C trace context, if it sent one
    timeline: Timeline = field(default_factory=Timeline, compare=False)  # written as it goes


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive new tokens. ``finish_reason`` ("stop" or "length") is on the last chunk only."""

    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None  # one a token, if the request asks
    # On the first chunk only:
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # if it asks; the first token: None
    num_cached_tokens: int | None = None  # prompt tokens whose KV was not computed

    def followed_by(self, later: TokenChunk) -> TokenChunk:
        """Both as one; ``later`` is not the first of its request."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = [*(self.logprobs or ()), *(later.logprobs or ())]
        return replace(
            self,
            token_ids=[*self.token_ids, *later.token_ids],
            finish_reason=later.finish_reason,
            logprobs=logprobs,
        )


@dataclass(frozen=True, slots=True)
class QueueState:
    """What waits for workers now, in the router."""

    requests: list[tuple[float, int]]  # seconds since each came, its tokens
    short_of: list[Role]  # the pools without room for the request whose turn it is
    wait: float  # seconds that one would wait that comes now, behind all others

    def row(self) -> dict[str, Any]:
        """The state as JSON, without the requests."""
        return {"waiting": len(self.requests), "short_of": self.short_of, "wait": self.wait}


class Generator(Protocol):
    """Turns requests into tokens, wherever the workers are."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield the request's tokens in order, each once.

        Closing the generator cancels the request on its workers. Raises KvferryError.
        """
        ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that the workers serve, in tokens; 0 while there are none."""
        ...

    @property
    def colocated(self) -> bool:
        """Whether decode workers compute all prompts themselves."""
        ...

    def workers(self) -> list[dict[str, Any]]:
        """One row a worker, for ``GET /admin/workers``."""
        ...

    def drain(self, worker_id: str) -> dict[str, Any]:
        """Ask a worker to leave the pools; its row. Raises WorkerNotFoundError."""
        ...

    @property
    def pools(self) -> Pools:
        """The sizes of both pools, and their change."""
        ...

    def queue(self) -> QueueState:
        """The requests that wait for workers."""
        ...

    def disaggregation(self) -> dict[str, Any]:
        """Who computes prompts, for ``GET /admin/disaggregation``."""
        ...

    def disaggregate(self, mode: Mode, local_tokens: int | None) -> None:
        """Change that; see ``router.disaggregation``. Raises ConfigError."""
        ...

    def not_ready_reason(self) -> str | None:
        """Why requests cannot be served now, or None when they can."""
        ...
