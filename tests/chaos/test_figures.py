"""What counts as a wrong token, and what rounding excuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from tests.chaos.asks import Ask, Reference
from tests.chaos.clients import FINISHED, Stream
from tests.chaos.figures import Figures

ANSWER = [5, 6, 7, 8]


class Ties:
    """A reference in whose eyes ``tokens`` are as good as the answer's."""

    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens

    def is_tie(self, ask: Ask, tokens: Sequence[int], other: int) -> bool:
        assert list(tokens) == ANSWER[: len(tokens)]
        return other in self._tokens


def compared(token_ids: list[int], *ties: int, ending: str = FINISHED) -> Figures:
    figures = Figures(allowed=frozenset({"cut"}))
    stream = Stream(Ask((1,), 4), token_ids=token_ids, ending=ending)
    figures.compare([stream], [ANSWER], cast(Reference, Ties(*ties)))
    return figures


@pytest.mark.parametrize(
    ("token_ids", "ties", "wrong"),
    [
        (ANSWER, (), 0),
        ([5, 9, 7, 8], (), 1),
        ([5, 9, 1, 2], (9,), 0),  # nothing after a tie is the same
        ([5, 9, 1], (9,), 1),  # but as much of it
        ([5, 9, 1, 2], (1, 2), 3),
        ([5, 6, 7], (), 1),
        ([5, 6, 7, 8, 8], (), 1),
    ],
)
def test_wrong_tokens(token_ids: list[int], ties: tuple[int, ...], wrong: int) -> None:
    figures = compared(token_ids, *ties)
    assert figures.tokens_wrong == wrong
    assert figures.ties == (9 in ties)
    assert bool(figures.broken) == (wrong > 0)


def test_a_stream_that_was_cut_is_held_to_the_beginning() -> None:
    assert compared([5, 6], ending="cut").broken == []
    assert compared([6], ending="cut").tokens_wrong == 1
