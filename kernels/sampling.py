"""Draws each row's next token from its filtered softmax, without sorting the vocabulary.

Every filter keeps the tokens whose logit reaches a threshold, so tokens of equal probability are
kept or dropped together:

- top-k keeps tokens that fewer than k others exceed;
- top-p then keeps tokens for which all more probable ones together hold less than p;
- min-p then keeps tokens at least min_p times as probable as the most probable.

The choice is the argmax of the kept tokens' logits, over the temperature, plus Gumbel noise
(Gumbel-max), which draws from their softmax; the noise of a token does not depend on the filters
or on other rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.gumbel import gumbel_noise

NUM_CANDIDATES = 1024  # most rows' top-p set is among so many tokens; the others sort them all


@dataclass(frozen=True, slots=True, eq=False)
class SamplingMetadata:
    """How each row's token is chosen. Every tensor is [rows], on the device of the logits."""

    temperature: Tensor  # float32; 0 takes the most probable token, whatever the rest says
    top_p: Tensor  # float32 in (0, 1]; 1 keeps all
    min_p: Tensor  # float32 in [0, 1]; 0 keeps all
    top_k: Tensor  # int64, at least 1; the vocabulary's size or more keeps all
    seeds: Tensor  # int64
    positions: Tensor  # int64

    def select(self, rows: Tensor) -> SamplingMetadata:
        """Of some rows, int64 [count]."""
        return SamplingMetadata(
            self.temperature[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.top_k[rows],
            self.seeds[rows],
            self.positions[rows],
        )


def forbid_unset(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Forbid, in some rows, the tokens whose bit is not set; in place.

    ``logits`` is float32 [rows, vocab], ``rows`` int64 [masked rows], ``bits`` int32
    [masked rows, ceil(vocab / 32)] with token 0 in the lowest bit.
    """
    logits[rows] = torch.where(_unpack(bits, logits.shape[1]), logits[rows], -math.inf)


def _unpack(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of each row of int32 words, lowest first: bool [rows, count]."""
    if not bits.is_cuda:  # many times faster than torch's shifts
        octets = bits.view(torch.uint8).numpy()
        return torch.from_numpy(np.unpackbits(octets, 1, count, "little")).view(torch.bool)
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(1)[:, :count].bool()


def sample_tokens(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """The next token of each row, int64 [rows]; the first of equals without a temperature.

    ``logits`` is float32 [rows, vocab], contiguous; -inf forbids a token.
    """
    if use_triton(logits):
        from kernels.gpu.sampling import sample_tokens_triton

        return sample_tokens_triton(logits, meta)
    return sample_tokens_torch(logits, meta)


def sample_tokens_torch(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """``sample_tokens`` on the CPU."""
    tokens = logits.argmax(dim=-1)
    drawn = _where(meta.temperature > 0)
    if len(drawn):
        tokens[drawn] = _draw(logits[drawn], meta.select(drawn))
    return tokens


def _draw(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """Of rows with a temperature: int64 [rows]. ``logits`` is changed."""
    lowest = _lowest_kept(logits, meta)
    if lowest is not None:
        logits.masked_fill_(logits < lowest, -math.inf)
    logits /= meta.temperature.unsqueeze(1)
    logits += gumbel_noise(meta.seeds, meta.positions, logits.shape[-1])
    return logits.argmax(dim=-1)


def _lowest_kept(logits: Tensor, meta: SamplingMetadata) -> Tensor | None:
    """The lowest logit that each row's filters keep, [rows, 1]; None when no row filters."""
    lowest = torch.full_like(logits[:, :1], -math.inf)
    temperature = meta.temperature.unsqueeze(1)
    narrow = _where(meta.top_k < logits.shape[-1])
    if len(narrow):
        top_k = meta.top_k[narrow].unsqueeze(1)
        largest = logits[narrow].topk(int(top_k.max())).values
        lowest[narrow] = largest.gather(1, top_k - 1)
    nucleus = _where(meta.top_p < 1)
    if len(nucleus):
        kept = logits[nucleus].masked_fill(logits[nucleus] < lowest[nucleus], -math.inf)
        lowest[nucleus] = _lowest_in_nucleus(kept, temperature[nucleus], meta.top_p[nucleus])
    if (meta.min_p > 0).any():
        ratio = meta.min_p.log().unsqueeze(1)  # log 0 is -inf: keeps all
        lowest = torch.maximum(lowest, logits.amax(-1, keepdim=True) + temperature * ratio)
    elif not len(narrow) and not len(nucleus):
        return None
    return lowest


def _lowest_in_nucleus(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit in each row's top-p set, [rows, 1]; ``temperature`` is [rows, 1]."""
    total = (logits / temperature).logsumexp(-1, keepdim=True)
    bound = top_p.double().unsqueeze(1)
    few = logits.topk(min(NUM_CANDIDATES, logits.shape[-1])).values
    lowest, mass = _last_of(few, temperature, total, bound)
    # Which way a row goes depends on that row alone.
    wide = _where((mass < bound).squeeze(1))
    if len(wide) and few.shape[-1] < logits.shape[-1]:
        descending = logits[wide].sort(descending=True).values
        lowest[wide], _ = _last_of(descending, temperature[wide], total[wide], bound[wide])
    return lowest


def _last_of(
    descending: Tensor, temperature: Tensor, total: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The last of the descending logits that top-p keeps, and their whole probability mass."""
    probabilities = (descending / temperature - total).double().exp()
    mass = probabilities.cumsum(-1)
    num_kept = ((mass - probabilities) < top_p).sum(-1, keepdim=True).clamp(min=1)
    return descending.gather(1, num_kept - 1), mass[:, -1:]


def _where(rows: Tensor) -> Tensor:
    """The indices of the true ones, int64."""
    return rows.nonzero().squeeze(1)
