"""The seam between the router's text half and its dispatch half: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    timeout: float | None = None  # seconds the client gives it, if it says


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive new tokens. ``finish_reason`` ("stop" or "length") is on the last chunk only."""

    token_ids: list[int]
    finish_reason: str | None = None


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

    def workers(self) -> list[dict[str, Any]]:
        """One row a worker, for ``GET /admin/workers``."""
        ...

    def drain(self, worker_id: str) -> dict[str, Any]:
        """Ask a worker to leave the pools; its row. Raises WorkerNotFoundError."""
        ...

    def not_ready_reason(self) -> str | None:
        """Why requests cannot be served now, or None when both pools serve."""
        ...
