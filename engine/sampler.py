"""Chooses each row's next token. Stateless: random numbers depend on (seed, position) alone.

Order, that of transformers: bias, min_tokens, repetition penalty, frequency and presence penalty,
grammar, and then, in ``kernels.sampling``, temperature, top-k, top-p and min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from engine.grammar import Masks
from engine.sequence import Sequence
from kernels.sampling import SamplingMetadata, forbid_unset, sample_tokens

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow


def sample(logits: Tensor, sequences: Rows[Sequence], masks: Masks | None = None) -> list[int]:
    """The next token of each sequence from ``logits``, float32 [rows, vocab]; may change them.

    ``masks`` holds what the sequences' grammars allow, if any has one.
    """
    if not sequences:
        return []
    _add_bias(logits, sequences)
    _forbid_early_stops(logits, sequences)
    _penalize(logits, sequences)
    if masks is not None:
        rows, bits = torch.tensor(masks.rows), torch.from_numpy(masks.bits)
        forbid_unset(logits, rows.to(logits.device), bits.to(logits.device))
    chosen: list[int] = sample_tokens(logits, _metadata(logits, sequences)).tolist()
    return chosen


def _add_bias(logits: Tensor, sequences: Rows[Sequence]) -> None:
    """Add each row's ``logit_bias``, in place; a token named twice gains both."""
    entries = [
        (row, token, bias)
        for row, sequence in enumerate(sequences)
        for token, bias in sequence.sampling.logit_bias
        if token < logits.shape[1]
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        where = torch.tensor((rows, tokens), device=logits.device)
        logits.index_put_((where[0], where[1]), logits.new_tensor(biases), accumulate=True)


def _forbid_early_stops(logits: Tensor, sequences: Rows[Sequence]) -> None:
    """Before its ``min_tokens`` a row samples none of its stop tokens; masks say so themselves."""
    stops = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.num_output_tokens < sequence.sampling.min_tokens
        and sequence.sampling.grammar is None
        for token in sequence.sampling.stop_token_ids
        if token < logits.shape[1]
    ]
    if stops:
        rows, tokens = torch.tensor(stops, device=logits.device).unbind(1)
        logits[rows, tokens] = -math.inf


def _penalize(logits: Tensor, sequences: Rows[Sequence]) -> None:
    """Apply all penalties, in place."""
    rows, tokens, divisors, deductions = [], [], [], []  # an entry for each row's every token
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if not params.has_penalties:
            continue
        seen, places = np.unique(np.array(sequence.token_ids), return_inverse=True)
        counts = np.bincount(places[sequence.num_prompt_tokens :], minlength=len(seen))
        rows.append(np.full_like(seen, row))
        tokens.append(seen)
        divisors.append(np.full(len(seen), params.repetition_penalty))
        deductions.append(
            counts * params.frequency_penalty + (counts > 0) * params.presence_penalty
        )
    if not rows:
        return
    where = np.stack((np.concatenate(rows), np.concatenate(tokens)))
    amounts = np.stack((np.concatenate(divisors), np.concatenate(deductions)))
    row_ids, token_ids = torch.from_numpy(where).to(logits.device)
    divisor, deduction = torch.from_numpy(amounts).to(logits)
    values = logits[row_ids, token_ids]
    values = torch.where(values > 0, values / divisor, values * divisor)
    logits[row_ids, token_ids] = values - deduction


def _metadata(logits: Tensor, sequences: Rows[Sequence]) -> SamplingMetadata:
    params = [sequence.sampling for sequence in sequences]
    temperatures = [p.temperature if p.temperature >= GREEDY_BELOW else 0.0 for p in params]
    fractions = [temperatures, [p.top_p for p in params], [p.min_p for p in params]]
    integers = [
        [p.top_k or logits.shape[1] for p in params],
        [_signed(p.seed) for p in params],
        [sequence.num_tokens for sequence in sequences],
    ]
    return SamplingMetadata(
        *torch.tensor(fractions, dtype=torch.float32, device=logits.device),
        *torch.tensor(integers, dtype=torch.int64, device=logits.device),
    )


def _signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
