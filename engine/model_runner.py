"""Runs a batch: builds the step's tensors from its rows, computes, samples.

Owns no policy and no state beside the model and the arena; called from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, BatchRow
from engine.model import Model, StepInput
from engine.sampler import sample
from kernels.attention_metadata import AttentionMetadata

Integers = NDArray[np.int64]


class ModelRunner:
    """``arena`` is [blocks, kv heads, layers, 2, block_size, head_dim], on the model's device."""

    def __init__(self, model: Model, arena: Tensor) -> None:
        self._model = model
        self._arena = arena
        self._block_size = arena.shape[4]

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int]:
        """Write the KV of every row's tokens; one new token per sampling row, in batch order.

        The unwritten tail of a completed prompt's last block is zeroed: what is handed on holds
        nothing of the block's former owner.
        """
        logits = self._model.forward(self._step_input(batch), self._arena)
        for row in batch.sampling_rows:
            used = row.end % self._block_size
            if used and row.end == row.sequence.num_prompt_tokens:
                last = row.sequence.block_table[row.end // self._block_size]
                self._arena[last, :, :, :, used:] = 0
        return sample(logits, [row.sequence for row in batch.sampling_rows])

    def _step_input(self, batch: Batch) -> StepInput:
        decode = [row for row in batch.rows if row.num_tokens == 1]
        prefill = [row for row in batch.rows if row.num_tokens > 1]
        rows = decode + prefill
        last = np.cumsum([row.num_tokens for row in rows]) - 1  # index of each row's last token
        index = {id(row): int(end) for row, end in zip(rows, last, strict=True)}
        return StepInput(
            token_ids=self._tensor(
                np.concatenate([row.sequence.token_ids[row.start : row.end] for row in rows])
            ),
            positions=self._tensor(np.concatenate([np.arange(row.start, row.end) for row in rows])),
            slots=self._tensor(np.concatenate([self._slots(row) for row in rows])),
            sampled=self._tensor(np.array([index[id(row)] for row in batch.sampling_rows])),
            num_decode=len(decode),
            decode=self._metadata(decode),
            prefill=self._metadata(prefill),
        )

    def _slots(self, row: BatchRow) -> Integers:
        first = row.start // self._block_size
        table = np.array(row.sequence.block_table[first : -(-row.end // self._block_size)])
        indices, offsets = np.divmod(np.arange(row.start, row.end), self._block_size)
        slots: Integers = table[indices - first] * self._block_size + offsets
        return slots

    def _metadata(self, rows: Rows[BatchRow]) -> AttentionMetadata | None:
        if not rows:
            return None
        return AttentionMetadata.build(
            [row.sequence.block_table for row in rows],
            [row.num_tokens for row in rows],
            [row.end for row in rows],
            self._arena.device,
        )

    def _tensor(self, values: Integers) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._arena.device)
