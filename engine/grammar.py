"""Structured output: which tokens each sequence may sample next, as its grammar has it.

A matcher's state is a function of the grammar and the output tokens: a sequence that comes from
another worker, or comes back, is matched anew from its tokens. Masks are computed on a thread of
their own beside the forward pass, grammars are compiled on another.

A stop token may be sampled only where the text may end, and before ``min_tokens`` only where it
must. It ends the sequence and is no part of the text, whatever the grammar would make of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.grammar import LIMITS, source
from protocol.sampling import Grammar

MAX_COMPILED = 64  # grammars kept, the latest used


@dataclass(slots=True)
class Masks:
    """What the sequences of one step that have a grammar may sample."""

    rows: list[int]  # of the step's sequences
    bits: NDArray[np.int32]  # [rows, ceil(vocab / 32)], token 0 in the lowest bit
    failures: dict[str, str] = field(default_factory=dict)  # by request; such a row allows all


class Grammars:
    """The grammars and matchers of one engine.

    ``folder`` holds the checkpoint, of which tokenizer.json is read when the first grammar comes.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._lock = Lock()  # of _compiled
        # Of each sequence: its matcher and how many output tokens that has consumed.
        self._matchers: WeakKeyDictionary[Sequence, tuple[LLMatcher, int]] = WeakKeyDictionary()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._masker = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")

    def expect(self, grammar: Grammar) -> Future[LLMatcher]:
        """Compile a grammar soon to be needed, unless that is done; from any thread."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._compiler.submit(self._compile, grammar)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher

    def masks(self, sequences: Rows[Sequence]) -> Future[Masks] | None:
        """Begin the masks of a step that samples for ``sequences``; None when it needs none.

        The sequences must not change before the result is there.
        """
        rows = [row for row, s in enumerate(sequences) if s.sampling.grammar is not None]
        return self._masker.submit(self._fill_all, rows, sequences) if rows else None

    # On the compiler's thread ----------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequestError("structured output: the checkpoint has no tokenizer.json")
        try:
            return LLTokenizer(
                str(path), n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids) or None
            )
        except ValueError as error:
            message = f"structured output does not know the checkpoint's tokenizer: {error}"
            raise InvalidRequestError(message) from error

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, source(grammar), log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise InvalidRequestError(f"{grammar.kind}: {matcher.get_error()}")
        except InvalidRequestError:  # an exception kept would collect everyone's traceback
            with self._lock:
                self._compiled.pop(grammar, None)
            raise
        return matcher

    # On the masks' thread --------------------------------------------------------------------

    def _fill_all(self, rows: list[int], sequences: Rows[Sequence]) -> Masks:
        masks = Masks(rows, np.empty((len(rows), -(-self._vocab_size // 32)), np.int32))
        for bits, row in zip(masks.bits, rows, strict=True):
            try:
                self._fill(bits, sequences[row])
            except InvalidRequestError as error:
                bits[:] = -1
                masks.failures[sequences[row].request_id] = str(error)
        return masks

    def _fill(self, bits: NDArray[np.int32], sequence: Sequence) -> None:
        matcher = self._matcher(sequence)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():
            raise InvalidRequestError(f"structured output: {matcher.get_error()}")
        sampling = sequence.sampling
        stops = np.array([t for t in sampling.stop_token_ids if t < self._vocab_size], np.int64)
        _forbid(bits, np.array(self._tokenizer.eos_tokens))
        _forbid(bits, stops)
        may_end = matcher.is_accepting()
        if may_end and (sequence.num_output_tokens >= sampling.min_tokens or not bits.any()):
            np.bitwise_or.at(bits, stops >> 5, _bit(stops))
        if not bits.any():
            reason = "may only end here, without a stop token" if may_end else "allows no token"
            raise InvalidRequestError(f"structured output: the grammar {reason}")

    def _matcher(self, sequence: Sequence) -> LLMatcher:
        """Where the sequence's output has brought its grammar."""
        assert sequence.sampling.grammar is not None
        matcher, num_consumed = self._matchers.get(sequence, (None, 0))
        if matcher is None:
            matcher = self.expect(sequence.sampling.grammar).result().deep_copy()
        fresh = sequence.token_ids[sequence.num_prompt_tokens + num_consumed :]
        if not matcher.consume_tokens(fresh):
            raise InvalidRequestError("structured output: the output so far breaks the grammar")
        self._matchers[sequence] = matcher, sequence.num_output_tokens
        return matcher


def _forbid(bits: NDArray[np.int32], token_ids: NDArray[np.int64]) -> None:
    np.bitwise_and.at(bits, token_ids >> 5, ~_bit(token_ids))


def _bit(token_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Each token's bit in its word."""
    return (np.uint32(1) << (token_ids & 31).astype(np.uint32)).view(np.int32)
