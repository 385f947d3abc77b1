"""Turns a batch's rows into the tensors that a step computes from."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, BatchRow
from engine.model import StepInput
from kernels.attention_metadata import AttentionMetadata


def decode_inputs(rows: Rows[BatchRow], block_size: int) -> tuple[list[int], list[int], list[int]]:
    """Token id, position and slot of each row's one new token."""
    token_ids = [row.sequence.token_ids[row.start] for row in rows]
    positions = [row.start for row in rows]
    slots = []
    for row in rows:
        index, offset = divmod(row.start, block_size)
        slots.append(row.sequence.block_table[index] * block_size + offset)
    return token_ids, positions, slots


def step_input(batch: Batch, block_size: int, device: torch.device) -> StepInput:
    """Of any batch: rows of one new token first, then the others.

    Logits are needed of each sampling row's last token, and then of the tokens that predict the
    rows' ``scored_tokens``, row by row.
    """
    decode = [row for row in batch.rows if row.num_tokens == 1]
    prefill = [row for row in batch.rows if row.num_tokens > 1]
    inputs = np.empty((3, batch.num_tokens), np.int64)  # token ids, positions, slots
    inputs[:, : len(decode)] = decode_inputs(decode, block_size)
    start = len(decode)
    for row in prefill:
        token_ids, positions, slots = inputs[:, start : start + row.num_tokens]
        token_ids[:] = row.sequence.token_ids[row.start : row.end]
        positions[:] = np.arange(row.start, row.end)
        indices, offsets = np.divmod(positions, block_size)
        slots[:] = row.sequence.blocks()[indices].astype(np.int64) * block_size + offsets
        start += row.num_tokens
    starts = accumulate((row.num_tokens for row in (*decode, *prefill)), initial=0)
    first = {id(row): start for row, start in zip((*decode, *prefill), starts, strict=False)}
    sampled = [first[id(row)] + row.num_tokens - 1 for row in batch.sampling_rows]
    scored = [first[id(row)] + i for row in batch.rows for i in range(len(row.scored_tokens))]
    on_device = torch.from_numpy(inputs).to(device)
    return StepInput(
        token_ids=on_device[0],
        positions=on_device[1],
        slots=on_device[2],
        sampled=_int64([*sampled, *scored], device),
        num_decode=len(decode),
        decode=_metadata(decode, device),
        prefill=_metadata(prefill, device),
    )


def _metadata(rows: Rows[BatchRow], device: torch.device) -> AttentionMetadata | None:
    if not rows:
        return None
    return AttentionMetadata.build(
        [row.sequence.blocks() for row in rows],
        [row.num_tokens for row in rows],
        [row.end for row in rows],
        device,
    )


def _int64(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
