"""How a step's token budget is shared, in prefill and in decode. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def prompt_budget(budget: int, num_generating: int) -> int:
    """Prompt tokens of a step in which ``num_generating`` sequences take one token each.

    At least half the budget, rounded up, however many they are.
    """
    return max(budget - num_generating, -(-budget // 2))


def shares(remaining: Sequence[int], budget: int) -> list[int]:
    """Tokens that each prompt computes in the step, of those it has left; oldest first.

    The oldest is sure of half the budget, rounded up; the others share the rest, those with the
    least left first. So nobody starves, and a long prompt does not hold up short ones.
    """
    if not remaining:
        return []
    half = -(-budget // 2)
    oldest = min(remaining[0], max(half, budget - sum(remaining[1:])))
    given = [oldest, *(0 for _ in remaining[1:])]
    left = budget - oldest
    for index in sorted(range(1, len(remaining)), key=remaining.__getitem__):
        given[index] = min(remaining[index], left)
        left -= given[index]
    return given
