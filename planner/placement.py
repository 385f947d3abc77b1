"""How many workers of which kind, and their limits: what a simulation runs and a plan compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """Either ``prefill`` and ``decode`` workers, or ``colocated`` ones that do both.

    ``max_num_batched_tokens`` is the token budget of a step: of a prefill worker's prompt tokens,
    of a colocated worker's prompt tokens and decode rows together. ``local_prefill_tokens`` is the
    longest prompt that a decode worker of two pools computes itself (``router.disaggregation``).
    """

    prefill: int = 0
    decode: int = 0
    colocated: int = 0
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256  # of a decode batch; a prefill step has a quarter as many
    block_size: int = 64  # tokens of a KV block
    local_prefill_tokens: int = 0

    def __post_init__(self) -> None:
        pools = self.prefill > 0 and self.decode > 0 and self.colocated == 0
        if not pools and not (self.prefill == self.decode == 0 and self.colocated > 0):
            raise ConfigError("a placement has a prefill and a decode worker, or only colocated")
        if min(self.max_num_batched_tokens, self.max_num_seqs, self.block_size) < 1:
            raise ConfigError("a placement's limits must be at least 1")
        if self.local_prefill_tokens and not pools:
            raise ConfigError("only a decode worker of two pools has prompts of its own")

    def with_pools(
        self, prefill: int, decode: int, local_prefill_tokens: int | None = None
    ) -> Placement:
        """Other pools under the same limits; without prefill workers, colocated ones."""
        if not prefill:
            return replace(self, prefill=0, decode=0, colocated=decode, local_prefill_tokens=0)
        local = self.local_prefill_tokens if local_prefill_tokens is None else local_prefill_tokens
        return replace(
            self, prefill=prefill, decode=decode, colocated=0, local_prefill_tokens=local
        )

    @property
    def num_workers(self) -> int:
        """Workers of all kinds."""
        return self.prefill + self.decode + self.colocated

    def __str__(self) -> str:
        pools = f"{self.prefill}P{self.decode}D" if self.prefill else f"{self.colocated} colocated"
        local = f", {self.local_prefill_tokens} local" if self.local_prefill_tokens else ""
        return f"{pools}, {self.max_num_batched_tokens}-token steps{local}"
