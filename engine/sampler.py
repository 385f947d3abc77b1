"""Chooses each row's next token. Stateless: random numbers depend on (seed, position) alone.

Order, that of transformers: min_tokens, repetition penalty, frequency and presence penalty,
temperature, top-k, top-p, min-p. Every filter keeps the tokens whose logit reaches a threshold,
so tokens of equal probability are kept or dropped together:

- top-k keeps tokens that fewer than k others exceed;
- top-p then keeps tokens for which all more probable ones together hold less than p;
- min-p then keeps tokens at least min_p times as probable as the most probable.

A row's choice is the argmax of its filtered logits plus Gumbel noise (Gumbel-max), which draws
from their softmax; the noise of a token does not depend on the filters or on other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence
from kernels.gumbel import gumbel_noise
from protocol.sampling import SamplingParams

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow
NUM_CANDIDATES = 1024  # most rows' top-p set is among so many tokens; the others sort them all


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence from ``logits``, float32 [rows, vocab]; may change them."""
    if not sequences:
        return []
    for row, sequence in enumerate(sequences):
        _adjust(logits[row], sequence)
    tokens = logits.argmax(dim=-1)  # [rows]
    rows = [row for row, seq in enumerate(sequences) if seq.sampling.temperature >= GREEDY_BELOW]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], [sequences[row] for row in rows])
    chosen: list[int] = tokens.tolist()
    return chosen


def _adjust(logits: Tensor, sequence: Sequence) -> None:
    """Forbid early stops and apply penalties, in place, to one row's ``logits`` [vocab]."""
    params = sequence.sampling
    if sequence.num_output_tokens < params.min_tokens:
        stops = [token for token in params.stop_token_ids if token < len(logits)]
        logits[stops] = -math.inf
    if params.has_penalties:
        _penalize(logits, sequence)


def _penalize(logits: Tensor, sequence: Sequence) -> None:
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(sequence.token_ids)).to(logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        tokens, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        penalties = torch.from_numpy(counts * params.frequency_penalty + params.presence_penalty)
        logits[torch.from_numpy(tokens).to(logits.device)] -= penalties.to(logits)


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Sample each row at its temperature: int64 [rows]. ``logits`` is changed."""
    params = [sequence.sampling for sequence in sequences]
    logits /= _column([p.temperature for p in params], logits)
    threshold = _threshold(logits, params)
    if threshold is not None:
        logits.masked_fill_(logits < threshold, -math.inf)
    seeds = torch.tensor([_signed(p.seed) for p in params], device=logits.device)
    positions = torch.tensor([sequence.num_tokens for sequence in sequences], device=logits.device)
    return (logits + gumbel_noise(seeds, positions, logits.shape[-1])).argmax(dim=-1)


def _threshold(logits: Tensor, params: Rows[SamplingParams]) -> Tensor | None:
    """The lowest logit that each row's filters keep, [rows, 1]; None when no row filters."""
    vocab_size = logits.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    threshold = torch.full_like(logits[:, :1], -math.inf)
    narrow = [row for row, k in enumerate(top_k) if k < vocab_size]
    if narrow:
        largest = logits[narrow].topk(max(top_k[row] for row in narrow)).values
        last = torch.tensor([[top_k[row] - 1] for row in narrow], device=logits.device)
        threshold[narrow] = largest.gather(1, last)
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        kept = logits[nucleus].masked_fill(logits[nucleus] < threshold[nucleus], -math.inf)
        threshold[nucleus] = _nucleus_threshold(kept, [params[row].top_p for row in nucleus])
    if any(p.min_p > 0.0 for p in params):
        min_p = _column([p.min_p for p in params], logits)  # log 0 is -inf: keeps all
        threshold = torch.maximum(threshold, logits.amax(-1, keepdim=True) + min_p.log())
    elif not narrow and not nucleus:
        return None
    return threshold


def _nucleus_threshold(logits: Tensor, top_p: Rows[float]) -> Tensor:
    """The smallest logit in each row's top-p set, [rows, 1]."""
    total = logits.logsumexp(-1, keepdim=True)
    bound = _column(top_p, logits).double()
    few = logits.topk(min(NUM_CANDIDATES, logits.shape[-1])).values
    threshold, mass = _smallest_kept(few, total, bound)
    # Which way a row goes depends on that row alone.
    wide = (mass < bound).squeeze(1).nonzero().squeeze(1)
    if len(wide) and few.shape[-1] < logits.shape[-1]:
        descending = logits[wide].sort(descending=True).values
        threshold[wide], _ = _smallest_kept(descending, total[wide], bound[wide])
    return threshold


def _smallest_kept(descending: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The last of the descending logits that top-p keeps, and their whole probability mass."""
    probabilities = (descending - total).double().exp()
    mass = probabilities.cumsum(-1)
    num_kept = ((mass - probabilities) < top_p).sum(-1, keepdim=True).clamp(min=1)
    return descending.gather(1, num_kept - 1), mass[:, -1:]


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
