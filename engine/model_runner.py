"""Runs a batch: builds the step's tensors from its rows, computes, samples.

Owns no policy and no state beside the model, the arena and the grammars; called from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.batch import Batch, StepOutput
from engine.decode_graphs import DecodeGraphs
from engine.grammar import Grammars
from engine.logprobs import token_logprobs
from engine.model import Model, StepInput
from engine.profiling import Phases
from engine.sampler import sample
from engine.sequence import Sequence
from engine.step_inputs import step_input
from protocol.sampling import TokenLogprobs

SCORED_AT_ONCE = 128  # prompt tokens whose logits are in memory together


class ModelRunner:
    """``arena`` is [blocks, kv heads, layers, 2, block_size, head_dim], on the model's device.

    On a GPU steps run in a stream of their own, beside the transfer's copies; ``run`` returns when
    the step has ended there. Decode steps of up to ``graph_rows`` rows go through graphs; the
    arena's last block is then theirs. Without ``grammars`` no sequence may have one.
    """

    def __init__(
        self, model: Model, arena: Tensor, graph_rows: int = 0, grammars: Grammars | None = None
    ) -> None:
        self._model = model
        self._arena = arena
        self._graphs = DecodeGraphs(model, arena, graph_rows) if graph_rows else None
        self._grammars = grammars
        self._block_size = arena.shape[4]
        self._stream: torch.cuda.Stream | None = None
        if arena.is_cuda:
            self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(arena.device))
        self.phases = Phases()

    def capture(self) -> None:
        """Capture the graphs, on a GPU and before any step, in the stream that replays them."""
        if self._graphs is not None:
            with torch.cuda.stream(self._stream):
                self._graphs.capture()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """Write the KV of every row's tokens; one new token per sampling row, in batch order.

        The unwritten tail of a completed prompt's last block is zeroed: what is handed on holds
        nothing of the block's former owner.
        """
        sequences = [row.sequence for row in batch.sampling_rows]
        pending = self._grammars.masks(sequences) if self._grammars else None
        with torch.cuda.stream(self._stream):
            with self.phases.measure("prepare"):
                forward = self._prepare(batch)
            with self.phases.measure("forward"):
                logits, scored = forward()
                self._zero_tails(batch)
            with self.phases.measure("sample"):
                asking = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
                raw = logits[asking] if asking else logits[:0]  # a copy: sampling changes them
                masks = pending.result() if pending else None
                token_ids = sample(logits[: len(sequences)], sequences, masks)
                output = StepOutput(
                    token_ids,
                    _logprobs(raw, [(sequences[i], token_ids[i]) for i in asking]),
                    self._prompt_logprobs(batch, scored),
                    masks.failures if masks else {},
                )
                if self._stream is not None:
                    self._stream.synchronize()
        return output

    def _prepare(self, batch: Batch) -> Callable[[], tuple[Tensor, Tensor]]:
        """Put the batch where the step reads it; returns the step.

        That gives the logits of the sampling rows, perhaps followed by others, and the final
        hidden states of the tokens that predict the rows' ``scored_tokens``.
        """
        if self._graphs is not None and self._graphs.fits(batch):
            return partial(self._replay, self._graphs, self._graphs.fill(batch))
        step = step_input(batch, self._block_size, self._arena.device)
        return partial(self._compute, step, len(batch.sampling_rows))

    def _replay(self, graphs: DecodeGraphs, step: StepInput) -> tuple[Tensor, Tensor]:
        logits = graphs.compute(step)
        return logits, logits[:0]

    def _compute(self, step: StepInput, num_sampling: int) -> tuple[Tensor, Tensor]:
        hidden = self._model.hidden(step, self._arena)
        return self._model.logits(hidden[:num_sampling]), hidden[num_sampling:]

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> dict[str, list[TokenLogprobs]]:
        """Of the rows' ``scored_tokens``, by request; ``hidden`` is [scored tokens, hidden]."""
        found: dict[str, list[TokenLogprobs]] = {}
        start = 0
        for row in batch.rows:
            tokens, params = row.scored_tokens, row.sequence.sampling
            if not tokens:
                continue
            states = hidden[start : start + len(tokens)]
            start += len(tokens)
            entries = found[row.sequence.request_id] = []
            for first in range(0, len(tokens), SCORED_AT_ONCE):
                part = slice(first, first + SCORED_AT_ONCE)
                counts = [params.prompt_logprobs or 0] * len(tokens[part])
                entries += token_logprobs(self._model.logits(states[part]), tokens[part], counts)
        return found

    def _zero_tails(self, batch: Batch) -> None:
        for row in batch.sampling_rows:
            used = row.end % self._block_size
            if used and row.end == row.sequence.num_given_tokens:
                last = row.sequence.block_table[row.end // self._block_size]
                self._arena[last, :, :, :, used:] = 0


def _logprobs(logits: Tensor, chosen: list[tuple[Sequence, int]]) -> dict[str, TokenLogprobs]:
    """Of the tokens chosen for those that ask, by request; ``logits`` is [asking, vocab]."""
    counts = [sequence.sampling.logprobs or 0 for sequence, _ in chosen]
    entries = token_logprobs(logits, [token_id for _, token_id in chosen], counts)
    return {s.request_id: entry for (s, _), entry in zip(chosen, entries, strict=True)}
