"""The streams of ``/v1/completions`` and ``/v1/chat/completions``: a chunk for each piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.errors import KvferryError
from router.answers import usage
from router.event_stream import event_json, server_sent
from router.http_errors import error_body
from router.output import Piece
from router.stream import Job


class Chunks:
    """Words a job's pieces as chunks. A stream that fails has no ``[DONE]``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._head = job.head.fields(job.shape.chunk)
        if job.include_usage:
            self._head["usage"] = None
        self._opening = f'data: {event_json(self._head)[:-1]},"choices":['  # of every chunk
        self._num_tokens = 0
        self._num_cached_tokens = 0
        # Whose prompt's ids were sent, if they are asked for:
        self._told = [not job.return_token_ids] * len(job.choices)

    def begin(self) -> Sequence[bytes]:
        """The choices' openings."""
        openings = [self._job.shape.opening(choice) for choice in range(len(self._job.choices))]
        return [self._chunk(opening) for opening in openings if opening is not None]

    def push(self, piece: Piece) -> Sequence[bytes]:
        """The piece's chunk, if there is anything in it for the client."""
        job = self._job
        self._num_tokens += len(piece.token_ids)
        self._num_cached_tokens += job.num_cached_tokens(piece)
        if not (piece.shows or job.return_token_ids):
            return ()
        delta = job.shape.delta(piece)
        if job.return_token_ids:
            delta["token_ids"] = piece.token_ids
        if not self._told[piece.index]:
            self._told[piece.index] = True
            delta["prompt_token_ids"] = job.choices[piece.index].request.prompt_token_ids
        return (self._chunk(delta),)

    def end(self) -> Sequence[bytes]:
        """The token counts, if they are asked for, and the mark of the end."""
        done = b"data: [DONE]\n\n"
        job = self._job
        if not job.include_usage:
            return (done,)
        counts = usage(job.num_prompt_tokens, self._num_tokens, self._num_cached_tokens)
        return (server_sent({**self._head, "choices": [], "usage": counts}), done)

    def fail(self, error: KvferryError) -> Sequence[bytes]:
        """The error in OpenAI's form."""
        return (server_sent(error_body(error)),)

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return f"{self._opening}{event_json(choice)}]}}\n\n".encode()
