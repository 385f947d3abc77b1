"""A simulated request: the sequences that the real schedulers see, and when it got how far."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from planner.workload import PREFIX_TOKENS, Request
from protocol.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. ``kv`` is what decode runs: ``sequence`` itself where one worker
    does both, else its own.
    """

    number: int
    request: Request
    sequence: Sequence
    kv: Sequence
    asked: bool = False  # decode knows of it
    granted: bool = False  # and has room for it
    last_chunk: int = 0  # tokens of the step that gave its first token
    first_chunk: float = field(default=-1.0)  # when its first blocks could travel
    first_token: float = 0.0
    last_token: float = 0.0

    def hand_off(self) -> None:
        """Two workers will have it."""
        self.kv = _prompt(self.number, self.request, list(self.sequence.block_hashes))


def new_job(number: int, request: Request, block_size: int) -> Job:
    """A job whose blocks are named as its prompt's prefix says. Token values play no part."""
    prompt = _prompt(number, request, block_names(number, request, block_size))
    return Job(number, request, prompt, prompt)


def _prompt(number: int, request: Request, names: list[bytes]) -> Sequence:
    return Sequence(
        str(number),
        [0] * request.prompt_tokens,
        request.prompt_tokens,
        _sampling(request.output_tokens),
        block_hashes=names,
    )


def warm(pool: BlockPool, job: Job) -> None:
    """Leave the request's cached tokens, in whole blocks, in a pool's prefix cache."""
    num_blocks = job.request.cached_tokens // pool.block_size
    if not num_blocks:
        return
    tokens = num_blocks * pool.block_size
    names = job.sequence.block_hashes[:num_blocks]
    earlier = Sequence("", [0] * tokens, tokens, job.sequence.sampling, block_hashes=names)
    if pool.reserve(earlier, tokens):
        earlier.num_computed = tokens
        pool.publish(earlier, 0)
        pool.release_sequence(earlier)


def block_names(number: int, request: Request, block_size: int) -> list[bytes]:
    """A name for each full block of the prompt.

    Blocks within a shared prefix id have its name; what no id covers is the request's own. An id
    names all tokens before it too, so equal names mean equal prefixes.
    """
    names = []
    for index in range(request.prompt_tokens // block_size):
        last = ((index + 1) * block_size - 1) // PREFIX_TOKENS
        shared = last < len(request.prefix)
        owner = b"p%d" % request.prefix[last] if shared else b"r%d" % number
        names.append(b"%b.%d" % (owner, index))
    return names


@lru_cache(maxsize=4096)
def _sampling(output_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_tokens)
