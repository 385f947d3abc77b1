"""Runs a batch: builds the step's tensors from its rows, computes, samples.

Owns no policy and no state beside the model and the arena; called from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.batch import Batch
from engine.decode_graphs import DecodeGraphs
from engine.model import Model
from engine.profiling import Phases
from engine.sampler import sample
from engine.step_inputs import step_input


class ModelRunner:
    """``arena`` is [blocks, kv heads, layers, 2, block_size, head_dim], on the model's device.

    On a GPU steps run in a stream of their own, beside the transfer's copies; ``run`` returns when
    the step has ended there. Decode steps of up to ``graph_rows`` rows go through graphs; the
    arena's last block is then theirs.
    """

    def __init__(self, model: Model, arena: Tensor, graph_rows: int = 0) -> None:
        self._model = model
        self._arena = arena
        self._graphs = DecodeGraphs(model, arena, graph_rows) if graph_rows else None
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
    def run(self, batch: Batch) -> list[int]:
        """Write the KV of every row's tokens; one new token per sampling row, in batch order.

        The unwritten tail of a completed prompt's last block is zeroed: what is handed on holds
        nothing of the block's former owner.
        """
        sequences = [row.sequence for row in batch.sampling_rows]
        with torch.cuda.stream(self._stream):
            with self.phases.measure("prepare"):
                forward = self._prepare(batch)
            with self.phases.measure("forward"):
                logits = forward()
                self._zero_tails(batch)
            with self.phases.measure("sample"):
                token_ids = sample(logits[: len(sequences)], sequences)
                if self._stream is not None:
                    self._stream.synchronize()
        return token_ids

    def _prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """Put the batch where the step reads it; the step, which gives its rows' logits first."""
        if self._graphs is not None and self._graphs.fits(batch):
            return partial(self._graphs.compute, self._graphs.fill(batch))
        step = step_input(batch, self._block_size, self._arena.device)
        return partial(self._model.forward, step, self._arena)

    def _zero_tails(self, batch: Batch) -> None:
        for row in batch.sampling_rows:
            used = row.end % self._block_size
            if used and row.end == row.sequence.num_given_tokens:
                last = row.sequence.block_table[row.end // self._block_size]
                self._arena[last, :, :, :, used:] = 0
