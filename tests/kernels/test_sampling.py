"""Sampling: what the filters keep, by their definitions, and how the noise chooses among it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kernels import sampling
from kernels.gumbel import gumbel_noise
from kernels.sampling import SamplingMetadata, sample_tokens_torch
from tests.kernels.implementation import INTERPRETED, sample_tokens

VOCAB, POSITION = 7, 5
LEAD = 6.0  # above the differences between logits of the tests that look at what is kept
CASES = 3 if INTERPRETED else 75  # for each temperature


@pytest.fixture
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a kernel read a row of VOCAB logits in two tiles, the second not full."""
    if INTERPRETED:
        from kernels.gpu import sampling as gpu_sampling

        monkeypatch.setattr(gpu_sampling, "TILE", 4)


def metadata(
    rows: int,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = VOCAB,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: Iterable[int] | None = None,
) -> SamplingMetadata:
    return SamplingMetadata(
        temperature=torch.ones(rows) * temperature,
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        top_k=torch.full((rows,), top_k, dtype=torch.int64),
        seeds=torch.tensor(list(seeds or range(rows)), dtype=torch.int64),
        positions=torch.full((rows,), POSITION),
    )


@cache
def seeds_that_choose() -> list[int]:
    """For each token a seed whose noise makes it win, if it is kept, by more than LEAD."""
    count = 1 << 16
    positions = torch.full((count,), POSITION)
    best = gumbel_noise(torch.arange(count), positions, VOCAB).topk(2)
    leads = best.values[:, 0] - best.values[:, 1]
    seeds = []
    for token in range(VOCAB):
        wins = torch.where(best.indices[:, 0] == token, leads, 0.0)
        assert wins.max() > LEAD
        seeds.append(int(wins.argmax()))
    return seeds


def support(logits: list[float], **filters: float) -> set[int]:
    """The tokens of a vocabulary of VOCAB that the filters keep."""
    meta = metadata(VOCAB, seeds=seeds_that_choose(), **filters)  # type: ignore[arg-type]
    chosen = sample_tokens(torch.tensor(logits).repeat(VOCAB, 1), meta).tolist()
    return {token for token, choice in enumerate(chosen) if token == choice}


def expected_support(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> set[int]:
    """In exact arithmetic; probabilities are proportional to the weights."""
    tokens = range(len(weights))
    kept = [t for t in tokens if sum(w > weights[t] for w in weights) < top_k]
    total = sum(weights[t] for t in kept)

    def more_probable(token: int) -> Fraction:
        above = sum(weights[other] for other in kept if weights[other] > weights[token])
        return Fraction(above, total)

    kept = [t for t in kept if more_probable(t) < top_p]
    return {t for t in kept if weights[t] >= min_p * max(weights)}


@pytest.mark.usefixtures("_several_tiles")
@pytest.mark.parametrize("power", [1, 2])  # the temperature is its inverse
def test_filters_keep_exactly_what_their_definitions_say_ties_included(power: int) -> None:
    rng = random.Random(power)
    for _ in range(CASES):
        weights = [rng.choice([1, 2, 3, 5, 8, 13]) for _ in range(VOCAB)]
        top_k = rng.choice([1, 2, 4, 6, 7, 40])
        # Off every sum of weights, where float and exact arithmetic may differ.
        top_p = rng.choice([Fraction(1), Fraction(rng.randrange(1, 100_003), 100_003)])
        min_p = rng.choice([Fraction(0), Fraction(rng.randrange(1, 1000), 1009)])
        found = support(
            [math.log(weight) for weight in weights],
            temperature=1 / power,
            top_k=top_k,
            top_p=float(top_p),
            min_p=float(min_p),
        )
        probable = [weight**power for weight in weights]
        assert found == expected_support(probable, top_k, top_p, min_p)


def test_forbidden_tokens_are_never_kept() -> None:
    logits = [-math.inf, 1.0, -math.inf, 0.0, 0.0, 0.0, -math.inf]
    assert support(logits, top_k=6) == {1, 3, 4, 5}
    assert support(logits, top_k=6, top_p=0.999, min_p=1e-4) == {1, 3, 4, 5}
    assert support(logits, top_k=1) == {1}


def test_zeros_of_both_signs_are_equal() -> None:
    logits = [-1.0, 0.0, -0.0, *[-2.0] * 4]
    assert support(logits, top_k=1) == support(logits, min_p=1.0) == {1, 2}
    assert support(logits, top_p=0.01) == {1, 2}


def test_an_extreme_top_p_keeps_the_most_probable() -> None:
    assert support([3.0, *[0.0] * 6], top_p=1e-50) == {0}


@pytest.mark.usefixtures("_several_tiles")
def test_without_a_temperature_the_first_of_the_most_probable() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, [5, 6]], logits[2, [3, 4]], logits[3, 6] = 1.0, 2.0, -1.0
    chosen = sample_tokens(logits, metadata(4, temperature=0.0, top_k=1, min_p=0.5))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [0, 5, 3, 0]


def test_rows_keep_apart() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(4))
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 0.1])
    meta = metadata(8, temperature=temperature, top_p=0.8)
    together = sample_tokens(logits, meta)
    for row in range(8):
        only = torch.tensor([row])
        assert sample_tokens(logits[only], meta.select(only)).item() == together[row]


def test_the_noise_alone_chooses_among_equals() -> None:
    meta = metadata(16, top_k=1000, seeds=range(-8, 8))
    expected = gumbel_noise(meta.seeds, meta.positions, 1000).argmax(-1)
    assert torch.equal(sample_tokens(torch.zeros(16, 1000), meta), expected)


def test_no_rows() -> None:
    assert sample_tokens(torch.empty(0, VOCAB), metadata(0)).shape == (0,)


@pytest.mark.skipif(not INTERPRETED, reason="compares the kernel with its twin")
def test_a_large_vocabulary_gives_the_tokens_that_the_twin_gives() -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 9001, generator=random) * torch.tensor([[0.2], [3.0], [6.0]] * 4)
    meta = SamplingMetadata(
        temperature=torch.tensor([0.7, 1.0, 1.3, 0.0] * 3),
        top_p=torch.tensor([1.0, 0.9, 0.5, 0.99, 0.1, 0.7] * 2),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.02, 0.3] * 2),
        top_k=torch.tensor([9001, 50, 4000, 9001, 1, 9000] * 2),
        seeds=torch.arange(12) * 7919,
        positions=torch.arange(12),
    )
    assert torch.equal(sample_tokens(logits, meta), sample_tokens_torch(logits, meta))


@pytest.mark.skipif(INTERPRETED, reason="of the twin")
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.99])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_filters_agree_with_transformers_on_a_large_vocabulary(
    monkeypatch: pytest.MonkeyPatch, top_p: float, spread: float
) -> None:
    """A flat distribution's top-p set exceeds the candidates that are looked at first."""

    def choosing(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        return torch.nn.functional.one_hot(seeds, vocab_size) * 1e9

    monkeypatch.setattr(sampling, "gumbel_noise", choosing)
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * spread
    tokens = torch.zeros((1, 1), dtype=torch.long)
    expected = logits.unsqueeze(0)
    for warper in (TopKLogitsWarper(2900), TopPLogitsWarper(top_p), MinPLogitsWarper(0.01)):
        expected = warper(tokens, expected)
    kept = expected[0].isfinite().nonzero().squeeze(1).tolist()
    meta = metadata(3000, top_k=2900, top_p=top_p, min_p=0.01)
    chosen = sample_tokens(logits.repeat(3000, 1), meta).tolist()
    found = {token for token, choice in enumerate(chosen) if token == choice}
    # At the set's edge float32 and float64 may differ by a token.
    assert len(found ^ set(kept)) <= 1
    assert len(found) == pytest.approx(len(kept), abs=1)
