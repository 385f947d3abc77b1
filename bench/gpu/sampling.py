"""Sampling from a whole vocabulary: of the many times a row is read, one is from memory.

Peers sort: alone, and with the cumulative probabilities and the draw that follow.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu.case import Case, Check, Operation, Timed
from kernels.gpu.sampling import sample_tokens_triton
from kernels.sampling import SamplingMetadata, sample_tokens_torch

VOCAB, ROWS = 128256, 256
TOP_K, TOP_P = 50, 0.9


def metadata(
    rows: int, vocab: int, device: torch.device, *, temperature: float, top_k: int, top_p: float
) -> SamplingMetadata:
    return SamplingMetadata(
        temperature=torch.full((rows,), temperature, device=device),
        top_p=torch.full((rows,), top_p, device=device),
        min_p=torch.zeros(rows, device=device),
        top_k=torch.full((rows,), min(top_k, vocab), dtype=torch.int64, device=device),
        seeds=torch.arange(rows, device=device),
        positions=torch.arange(rows, device=device),
    )


def check(name: str, *, temperature: float, top_k: int = VOCAB, top_p: float = 1.0) -> Check:
    """The tokens that the twin draws, whatever ``dtype`` the logits were rounded to."""

    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, vocab = 6, 5000
        logits = (3 * torch.randn((rows, vocab), device=device)).to(dtype).float()
        options = partial(metadata, temperature=temperature, top_k=top_k, top_p=top_p)
        ours = sample_tokens_triton(logits, options(rows, vocab, device))
        twin = sample_tokens_torch(logits.cpu(), options(rows, vocab, torch.device("cpu")))
        return ours.float(), twin.to(device).float()

    return Check(f"sampling, {name}", run)


def case(name: str, *, temperature: float, top_k: int = VOCAB, top_p: float = 1.0) -> Case:
    def prepare() -> Timed:
        device = torch.device("cuda")
        logits = 3 * torch.randn((ROWS, VOCAB), device=device)
        meta = metadata(ROWS, VOCAB, device, temperature=temperature, top_k=top_k, top_p=top_p)

        def peers() -> dict[str, Operation]:
            if temperature == 0:
                return {"argmax": lambda: logits.argmax(-1)}
            return {
                "sort": lambda: logits.sort(descending=True),
                "sort and draw": lambda: sorted_draw(logits, meta),
            }

        return Timed(
            lambda: sample_tokens_triton(logits, meta),
            logits.numel() * logits.element_size(),
            peers,
        )

    return Case(f"sampling, {name}, {ROWS} rows", "copy", None, prepare)


def sorted_draw(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """The same filters by way of a sort."""
    scaled, tokens = (logits / meta.temperature.unsqueeze(1)).sort(descending=True)
    ranks = torch.arange(scaled.shape[1], device=scaled.device)
    scaled.masked_fill_(ranks >= meta.top_k.unsqueeze(1), -torch.inf)
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities.masked_fill_(before >= meta.top_p.unsqueeze(1), 0.0)
    return tokens.gather(1, torch.multinomial(probabilities, 1))


CHECKS = [
    check("greedy", temperature=0),
    check("temperature", temperature=0.7),
    check("top-k and top-p", temperature=1.0, top_k=TOP_K, top_p=TOP_P),
]
CASES = [
    case("greedy", temperature=0),
    case("temperature", temperature=0.7),
    case("top-p", temperature=1.0, top_p=TOP_P),
    case("top-k and top-p", temperature=1.0, top_k=TOP_K, top_p=TOP_P),
]
