"""Who computes a prompt: a prefill worker, or the decode worker that continues it by itself.

``always``  prefill, as long as there is a prefill pool to wait for
``never``   decode
``auto``    prefill; but decode where no prefill worker serves (the colocated mode), and decode
            where the prompt is short: what decode lacks of it delays the sequences that run there
            by less than any hand-off of late has delayed its own

How long hand-offs take and how fast workers compute prompts is measured; until both are known,
prompts go to prefill. A decode worker is asked only while it has no other prompt to compute and
at least half of its places are free: what it computes then costs nobody else a place.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from protocol.errors import ConfigError, UnavailableError
from protocol.messages import Role
from router.capacity import (
    Demand,
    held_sequences,
    queued_tokens,
    takes_prompt,
    takes_sequence,
    uncached_tokens,
)
from router.policy import POLICIES, Pair, PolicyName, check_serving, choose_decode, choose_pair
from router.registry import Registry, Worker

Mode = Literal["auto", "always", "never"]

FORGET = 1.02  # what a hand-off without a new minimum makes of the minimum


class Disaggregation:
    """``local_tokens`` is the longest prompt that auto calls short; None: as measured. What decode
    has cached of a prompt does not count. ``policy`` chooses among the workers of a pool.

    Raises ConfigError when another mode is given them.
    """

    def __init__(
        self,
        mode: Mode = "always",
        local_tokens: int | None = None,
        policy: PolicyName = "prefix-aware",
    ) -> None:
        self._mode: Mode = "always"
        self._local_tokens: int | None = None
        self._policy = POLICIES[policy]
        self._handoff_seconds = 0.0  # at least; 0: no hand-off was measured
        self.change(mode, local_tokens)

    def change(self, mode: Mode, local_tokens: int | None = None) -> None:
        """For the prompts that come from now on. Raises ConfigError as above."""
        if local_tokens is not None and mode != "auto":
            raise ConfigError("--local-prefill-tokens goes with --disaggregation auto")
        self._mode, self._local_tokens = mode, local_tokens

    def row(self, registry: Registry) -> dict[str, Any]:
        """What holds now. ``longest_local_prompt``: that decode computes beside a prefill pool."""
        limits = [0.0]
        if self._mode == "auto":
            prefills = registry.serving("prefill")
            limits += [self._threshold(decode, prefills) for decode in registry.serving("decode")]
        return {
            "mode": self._mode,
            "local_prefill_tokens": self._local_tokens,
            "longest_local_prompt": int(max(limits)),
        }

    def handed_off(self, seconds: float) -> None:
        """A hand-off took so long, from its first token to decode's work on the next.

        The least counts: the others had more blocks to move, or waited for something else.
        """
        known = self._handoff_seconds or seconds
        self._handoff_seconds = min(seconds, FORGET * known)

    def colocated(self, registry: Registry) -> bool:
        """Whether decode computes every prompt that comes now."""
        no_prefill = not registry.serving("prefill")
        return self._mode == "never" or (self._mode == "auto" and no_prefill)

    def prompt_pool(self, registry: Registry) -> list[Worker]:
        """The workers that compute long prompts now."""
        return registry.serving("decode" if self.colocated(registry) else "prefill")

    def check(self, registry: Registry) -> None:
        """Raise UnavailableError, saying what is missing, when no request can be served."""
        if not self.colocated(registry):
            check_serving(registry)
        elif not registry.serving("decode"):
            raise UnavailableError("no decode worker is serving")

    def choose(
        self, registry: Registry, demand: Demand, avoid: Set[str] = frozenset()
    ) -> Pair | None:
        """The workers for a request, or None while none have room."""
        if self.colocated(registry):
            decode = choose_decode(registry, demand, avoid, self._policy)
            return Pair(None, decode) if decode else None
        pair = choose_pair(registry, demand, avoid, self._policy)
        if self._mode == "always":
            return pair
        decode = pair.decode if pair else choose_decode(registry, demand, avoid, self._policy)
        if decode is not None and self._is_short(demand, decode, registry):
            return Pair(None, decode)
        return pair

    def short_of(self, registry: Registry, demand: Demand) -> Set[Role]:
        """The pools in which no worker has room for a request."""
        has_places = [w for w in registry.serving("decode") if takes_sequence(w, demand)]
        if self.colocated(registry):
            return set() if any(takes_prompt(w, demand) for w in has_places) else {"decode"}
        has_room = any(takes_prompt(w, demand) for w in registry.serving("prefill"))
        short: dict[Role, bool] = {"prefill": not has_room, "decode": not has_places}
        return {pool for pool, is_short in short.items() if is_short}

    def _is_short(self, demand: Demand, decode: Worker, registry: Registry) -> bool:
        spare = 2 * held_sequences(decode) < decode.load.max_num_seqs
        limit = self._threshold(decode, registry.serving("prefill"))
        return spare and queued_tokens(decode) == 0 and uncached_tokens(decode, demand) <= limit

    def _threshold(self, decode: Worker, prefills: list[Worker]) -> float:
        """Tokens that decode computes in the time of a hand-off."""
        if self._local_tokens is not None:
            return self._local_tokens
        rate = decode.load.prefill_tokens_per_second
        if rate == 0:  # it has computed none yet: it is taken to be as fast as prefill
            rate = min((w.load.prefill_tokens_per_second for w in prefills), default=0.0)
        return self._handoff_seconds * rate
