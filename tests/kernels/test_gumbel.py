"""Gumbel noise: bits against the definition in plain integers, distribution, independence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.gumbel import gumbel_noise

MASK = (1 << 64) - 1
INCREMENT = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def defined(seed: int, position: int, index: int) -> float:
    key = mix(mix((seed + INCREMENT * (position + 1)) & MASK))
    bits = mix((key + INCREMENT * (index + 1)) & MASK) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def noise(pairs: list[tuple[int, int]], vocab_size: int) -> Tensor:
    seeds, positions = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return gumbel_noise(seeds, positions, vocab_size)


def test_equals_the_definition() -> None:
    pairs = [(0, 0), (1, 0), (-1, 7), (2**63 - 1, 131071), (-(2**63), 1), (12345, 2**40)]
    result = noise(pairs, 40)
    expected = [[defined(seed, position, i) for i in range(40)] for seed, position in pairs]
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.tensor(expected, dtype=torch.float64).float())


def test_a_row_depends_on_its_pair_alone() -> None:
    pairs = [(3, 5), (3, 6), (4, 5), (3, 5)]
    together = noise(pairs, 1031)
    for index, pair in enumerate(pairs):
        assert torch.equal(noise([pair], 1031)[0], together[index])
    assert torch.equal(noise([(3, 5)], 77)[0], together[0, :77])
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_shapes() -> None:
    assert noise([], 10).shape == (0, 10)
    assert noise([(1, 2)], 1).shape == (1, 1)


def test_distribution_is_gumbel() -> None:
    values = noise([(9, position) for position in range(8)], 4096).double().flatten()
    assert values.isfinite().all()
    cumulative = (-(-values.sort().values).exp()).exp()
    n = len(values)
    empirical = torch.arange(1, n + 1, dtype=torch.float64) / n
    statistic = (empirical - cumulative).abs().max() * math.sqrt(n)
    assert statistic < 1.95  # Kolmogorov: exceeded once in a thousand samples


def test_argmax_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    draws = noise([(7, position) for position in range(4)], 10_000).view(-1, 5)
    counts = (draws + logits).argmax(-1).bincount(minlength=5).double()
    expected = logits.double().softmax(0) * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    assert statistic < 18.5  # chi-square with 4 degrees of freedom: once in a thousand samples


def test_neighbouring_seeds_positions_and_indices_are_uncorrelated() -> None:
    pairs = [(seed, position) for seed in (100, 101) for position in (8, 9)]
    a, by_position, by_seed, _ = noise(pairs, 16384).double()
    for x, y in ((a, by_position), (a, by_seed), (a[1:], a[:-1])):
        correlation = torch.corrcoef(torch.stack((x, y)))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(len(x))
