"""How many tokens of each prompt the next step computes, in prefill and in decode. No torch.

Prompts that begin alike may arrive before any of their KV is cached. Of those the first that runs
computes the common blocks; the others pass over the steps in which it does so, and go on behind
them (``BlockPool.adopt``). Nobody waits for a prompt that does not compute: one that has no grant
or no share of the budget holds up no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine.sequence import Sequence
from engine.token_budget import shares

Chunks = dict[Sequence, int]


def chunks(remaining: Mapping[Sequence, int], budget: int, block_size: int) -> Chunks:
    """Tokens of each prompt in the step; ``remaining``: how many it may compute, oldest first."""
    computing = dict(remaining)
    while True:
        given = dict(zip(computing, shares([*computing.values()], budget), strict=True))
        repeated = [*_repeated(given, block_size)]
        if not repeated:
            return {**dict.fromkeys(remaining, 0), **given}
        for sequence in repeated:
            del computing[sequence]


def _repeated(given: Chunks, block_size: int) -> Iterator[Sequence]:
    """Prompts that would begin with a block that one before them computes in this step."""
    coming: set[bytes] = set()
    for sequence, num_tokens in given.items():
        if num_tokens == 0:
            continue
        hashes, first = sequence.block_hashes, sequence.num_computed // block_size
        may_share = first < sequence.num_cacheable // block_size
        if may_share and hashes[first] in coming:
            yield sequence
        else:
            coming.update(hashes[first : -(-(sequence.num_computed + num_tokens) // block_size)])
