"""What a client sees of one sequence's tokens: text cut at its stop, ids, finish reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.detokenizer import Detokenizer
from router.generation import TokenChunk
from router.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one choice. ``finish_reason`` is on its last piece only."""

    index: int  # of the choice
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class Output:
    """One choice. A token that ended the sequence is counted but not shown.

    Stop strings count only in text of tokens after the first ``min_tokens``.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, chunk: TokenChunk) -> Piece:
        """The chunk's output; its finish reason is "stop" once a stop string is found."""
        texts: list[str] = []
        reason = chunk.finish_reason
        last = len(chunk.token_ids) - 1
        for position, token_id in enumerate(chunk.token_ids):
            self._num_tokens += 1
            if reason == "stop" and position == last and not self._include_stop:
                break  # the stop token itself
            text = self._detokenizer.feed(token_id)
            texts.append(self._search(text))
            if self._stops.matched:
                taken = chunk.token_ids[: position + 1]
                return Piece(self._index, "".join(texts), taken, "stop")
        if reason is not None:
            texts.append(self._search(self._detokenizer.flush()))
            texts.append(self._stops.flush())
            reason = "stop" if self._stops.matched else reason
        return Piece(self._index, "".join(texts), chunk.token_ids, reason)

    def _search(self, text: str) -> str:
        return text if self._num_tokens <= self._min_tokens else self._stops.feed(text)
