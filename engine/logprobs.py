"""How probable tokens were under the model's raw logits; ``TokenLogprobs`` says what that is."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from protocol.sampling import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Rows[int], num_top: Rows[int]) -> list[TokenLogprobs]:
    """Of one token a row, with the ``num_top`` most probable ones; equals rank alike.

    ``logits`` is float32 [rows, vocab].
    """
    if not token_ids:
        return []
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    best = logprobs.topk(min(max(num_top), logits.shape[1]), dim=-1)
    return [
        TokenLogprobs(logprob=logprob, rank=rank, top=list(zip(ids[:count], values, strict=False)))
        for logprob, rank, ids, values, count in zip(
            chosen.squeeze(1).tolist(),
            ranks.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            num_top,
            strict=True,
        )
    ]
