"""Sampling: distributions, penalties, stops, independence of rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.grammar import Masks
from engine.sampler import sample
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

LOGITS = [0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.3, 1.9]


def sequence(
    prompt: list[int] | None = None, output: list[int] | None = None, **sampling: object
) -> Sequence:
    prompt, output = prompt or [0], output or []
    params = SamplingParams(max_tokens=100, **sampling)  # type: ignore[arg-type]
    return Sequence("request", prompt + output, len(prompt), params)


def rows(values: list[float], count: int) -> Tensor:
    return torch.tensor(values).repeat(count, 1)


def chi_square(tokens: list[int], probabilities: Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


# Of a true sampler, one run in a million exceeds these (7 degrees of freedom, 3).
CRITICAL_7, CRITICAL_3 = 40.5, 30.7


def test_frequencies_over_seeds_are_those_of_the_softmax() -> None:
    for temperature in (0.7, 1.0, 1.8):
        sequences = [sequence(temperature=temperature, seed=seed) for seed in range(20_000)]
        tokens = sample(rows(LOGITS, len(sequences)), sequences)
        expected = (torch.tensor(LOGITS) / temperature).softmax(0)
        assert chi_square(tokens, expected) < CRITICAL_7


def test_frequencies_over_positions_are_those_of_the_softmax() -> None:
    sequences = [sequence(prompt=[0] * n, seed=11) for n in range(1, 8_000)]
    tokens = sample(rows(LOGITS, len(sequences)), sequences)
    assert chi_square(tokens, torch.tensor(LOGITS).softmax(0)) < CRITICAL_7


def test_frequencies_under_top_k_are_renormalised() -> None:
    sequences = [sequence(top_k=4, seed=seed) for seed in range(20_000)]
    logits = torch.tensor([1.5, -0.2, 0.9, 0.0, 2.0, -3.0, -1.0, -0.3])
    expected = logits.where(logits >= 0.0, -math.inf).softmax(0)
    tokens = sample(logits.repeat(len(sequences), 1), sequences)
    assert chi_square(tokens, expected) < CRITICAL_3


def test_repetition_penalty_agrees_with_transformers() -> None:
    logits = torch.tensor([LOGITS])
    seen = sequence(prompt=[1, 2, 2], output=[4, 6], repetition_penalty=1.3, temperature=0.0)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen.token_ids]), logits.clone())
    sample(logits, [seen])  # greedy rows keep their adjusted logits
    torch.testing.assert_close(logits, expected)


def test_frequency_and_presence_count_output_tokens_only() -> None:
    logits = torch.tensor([LOGITS])
    params = {"frequency_penalty": 0.25, "presence_penalty": -0.5, "temperature": 0.0}
    sample(logits, [sequence(prompt=[0, 0, 7], output=[3, 5, 3, 3], **params)])
    expected = torch.tensor([LOGITS])
    expected[0, 3] -= 3 * 0.25 - 0.5
    expected[0, 5] -= 0.25 - 0.5
    torch.testing.assert_close(logits, expected)


def test_penalties_change_no_other_row() -> None:
    logits = rows(LOGITS, 3)
    penalized = sequence(output=[2, 7, 7], repetition_penalty=5.0, temperature=0.0)
    plain = sequence(output=[2, 7, 7], temperature=0.0)
    assert sample(logits, [plain, penalized, plain]) == [2, 4, 2]
    assert torch.equal(logits[::2], rows(LOGITS, 2))


def test_stop_tokens_wait_for_min_tokens() -> None:
    params = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (2, 7, 99_999)}
    for generated, expected in ((0, 4), (2, 4), (3, 2)):
        assert sample(rows(LOGITS, 1), [sequence(output=[1] * generated, **params)]) == [expected]


def test_zero_and_tiny_temperatures_are_greedy() -> None:
    sequences = [sequence(temperature=t, seed=3) for t in (0.0, 1e-30, 9e-6)]
    assert sample(rows(LOGITS, 3), sequences) == [2, 2, 2]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 50, generator=generator)
    sequences = [
        sequence(
            prompt=[0] * (1 + row % 5),
            seed=row * 7919,
            temperature=(0.0, 0.8, 1.5)[row % 3],
            top_p=(1.0, 0.8)[row % 2],
            top_k=(0, 12)[row % 7 == 0],
        )
        for row in range(40)
    ]
    alone = [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    assert sample(logits.clone(), sequences) == alone
    order = torch.randperm(40, generator=generator)
    shuffled = sample(logits[order].clone(), [sequences[i] for i in order.tolist()])
    assert shuffled == [alone[i] for i in order.tolist()]


def test_all_64_bits_of_the_seed_count() -> None:
    seeds = [5, 5 + (1 << 32), 5 + (1 << 63), (1 << 64) - 1]
    logits = torch.zeros(1, 100_000)
    drawn = {sample(logits.clone(), [sequence(seed=seed)])[0] for seed in seeds}
    assert len(drawn) == len(seeds)


def test_no_sequences_no_tokens() -> None:
    assert sample(torch.empty(0, 8), []) == []


def test_bias_is_added_to_its_tokens_alone_before_the_penalties() -> None:
    logits = rows(LOGITS, 2)
    biased = sequence(
        output=[2],
        logit_bias=((0, 1.5), (2, -100.0), (0, 0.25), (99, 5.0)),
        repetition_penalty=2.0,
        temperature=0.0,
    )
    assert sample(logits, [sequence(temperature=0.0), biased]) == [2, 7]
    expected = rows(LOGITS, 2)
    expected[1, 0] = (LOGITS[0] + 1.75) / 2
    expected[1, 2] = (LOGITS[2] - 100) * 2
    torch.testing.assert_close(logits, expected)


def test_a_mask_leaves_its_row_the_tokens_whose_bits_are_set() -> None:
    for size in (31, 32, 33, 70):
        generator = torch.Generator().manual_seed(size)
        logits = torch.randn(4, size, generator=generator)
        allowed = torch.rand(2, size, generator=generator) < 0.5
        packed = np.packbits(allowed.numpy(), axis=1, bitorder="little")
        bits = np.zeros((2, -(-size // 32) * 4), np.uint8)
        bits[:, : packed.shape[1]] = packed
        expected = logits.clone()
        expected[[3, 1]] = expected[[3, 1]].where(allowed, -math.inf)
        sample(logits, [sequence(temperature=0.0)] * 4, Masks([3, 1], bits.view(np.int32)))
        assert torch.equal(logits, expected)
