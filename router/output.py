"""What a client sees of one sequence's tokens: text cut at its stop, ids, finish reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from router.detokenizer import Detokenizer
from router.generation import TokenChunk
from router.logprobs import ScoredToken
from router.reasoning import ReasoningParser
from router.stop_strings import StopStrings
from router.tool_calls import ToolCallDelta, ToolCallParser


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one sequence. ``finish_reason`` is on its last piece only."""

    index: int  # of the sequence in its request
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    scored: list[ScoredToken] = field(default_factory=list)  # of shown tokens, if asked for
    total_logprob: float = 0.0  # of token_ids, if asked for
    num_cached_tokens: int = 0  # of the prompt; on the first piece
    tool_calls: list[ToolCallDelta] = field(default_factory=list)  # which are no part of the text
    reasoning: str = ""  # which is none either

    @property
    def shows(self) -> bool:
        """Whether there is anything in it for the client; half a character is nothing yet."""
        shown = self.text or self.reasoning or self.tool_calls or self.scored
        return bool(shown or self.finish_reason)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is shown before its output."""

    token_ids: Sequence[int]
    text: str
    offsets: Sequence[int]  # where each token begins in the text

    @classmethod
    def of(cls, token_ids: Sequence[int], detokenizer: Detokenizer) -> Echo:
        """The prompt's tokens; the detokenizer is a new one. Work: one decoding a token."""
        parts: list[str] = []
        offsets: list[int] = []
        length = 0
        for token_id in token_ids:
            offsets.append(length)
            parts.append(detokenizer.feed(token_id))
            length += len(parts[-1])
        return cls(token_ids, "".join(parts), offsets)


class Output:
    """One sequence. A token that ended it is counted but not shown.

    Stop strings count only in text of tokens after the first ``min_tokens``. With
    ``only_echo`` the prompt is all that is shown: the output's token was not asked for.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        echo: Echo | None = None,
        only_echo: bool = False,
        reasoning: ReasoningParser | None = None,
        tool_calls: ToolCallParser | None = None,
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._echo = echo  # until it is shown
        self._only_echo = only_echo
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._num_tokens = 0
        self._offset = len(echo.text) if echo is not None else 0

    def push(self, chunk: TokenChunk) -> Piece:
        """The chunk's output; its finish reason is "stop" once a stop string is found."""
        piece = Piece(self._index, "", [], "length") if self._only_echo else self._shown(chunk)
        if self._echo is not None:
            echo, self._echo = self._echo, None
            entries = zip(echo.token_ids, echo.offsets, chunk.prompt_logprobs or [], strict=False)
            scored = [ScoredToken(*entry) for entry in entries]
            piece = replace(piece, text=echo.text + piece.text, scored=scored + piece.scored)
        if chunk.num_cached_tokens:
            piece = replace(piece, num_cached_tokens=chunk.num_cached_tokens)
        if self._reasoning is not None:
            piece = _without_reasoning(piece, self._reasoning)
        return piece if self._tool_calls is None else _without_calls(piece, self._tool_calls)

    def _shown(self, chunk: TokenChunk) -> Piece:
        texts: list[str] = []
        offsets: list[int] = []  # of the shown tokens
        reason = chunk.finish_reason
        last = len(chunk.token_ids) - 1
        for position, token_id in enumerate(chunk.token_ids):
            self._num_tokens += 1
            if reason == "stop" and position == last and not self._include_stop:
                break  # the stop token itself
            offsets.append(self._offset)
            text = self._detokenizer.feed(token_id)
            self._offset += len(text)
            texts.append(self._search(text))
            if self._stops.matched:
                return self._piece(chunk, "".join(texts), position + 1, offsets, "stop")
        if reason is not None:
            texts.append(self._search(self._detokenizer.flush()))
            texts.append(self._stops.flush())
            reason = "stop" if self._stops.matched else reason
        return self._piece(chunk, "".join(texts), len(chunk.token_ids), offsets, reason)

    def _piece(
        self, chunk: TokenChunk, text: str, num_taken: int, offsets: list[int], reason: str | None
    ) -> Piece:
        taken = chunk.token_ids[:num_taken]
        if chunk.logprobs is None:
            return Piece(self._index, text, taken, reason)
        logprobs = chunk.logprobs[:num_taken]
        scored = [
            ScoredToken(*entry) for entry in zip(taken, offsets, logprobs, strict=False)
        ]  # without the stop token, which has no offset
        total = sum(entry.logprob for entry in logprobs)
        return Piece(self._index, text, taken, reason, scored, total)

    def _search(self, text: str) -> str:
        return text if self._num_tokens <= self._min_tokens else self._stops.feed(text)


def _without_reasoning(piece: Piece, parser: ReasoningParser) -> Piece:
    reasoning, text = parser.feed(piece.text)
    if piece.finish_reason is not None:
        more_reasoning, more_text = parser.end()
        reasoning, text = reasoning + more_reasoning, text + more_text
    return replace(piece, text=text, reasoning=reasoning)


def _without_calls(piece: Piece, parser: ToolCallParser) -> Piece:
    """The piece with its calls apart from its text. The only call allowed is the output's end."""
    parsed = parser.feed(piece.text)
    text, calls = parsed.content, parsed.calls
    reason = piece.finish_reason
    if parser.complete:
        reason = "tool_calls"
    elif reason is not None:
        rest = parser.end()
        text, calls = text + rest.content, calls + rest.calls
        reason = "tool_calls" if reason == "stop" and parser.num_calls else reason
    return replace(piece, text=text, tool_calls=calls, finish_reason=reason)
