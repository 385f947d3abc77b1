"""Runs sequences through an engine step by step, as a scheduler would, with scattered blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many

from engine.batch import Batch, BatchRow
from engine.engine import Engine
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


def sequences_for(
    engine: Engine, prompts: Many[list[int]], sampling: SamplingParams, order: int = 0
) -> list[Sequence]:
    """Sequences whose blocks lie in random order among stale values, drawn by seed ``order``."""
    rng = random.Random(order)
    engine.rows.normal_(std=50.0)
    free = rng.sample(range(engine.num_blocks), engine.num_blocks)
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(f"request-{index}", list(prompt), len(prompt), sampling)
        count = engine.geometry.blocks_for(len(prompt) + sampling.max_tokens)
        sequence.block_table, free = free[:count], free[count:]
        assert len(sequence.block_table) == count, "the engine has too few blocks for the test"
        sequences.append(sequence)
    return sequences


def step(engine: Engine, sequences: Many[Sequence], budget: int) -> None:
    """One step of at most ``budget`` prompt tokens, beside those that only decode."""
    rows = []
    for sequence in sequences:
        remaining = sequence.num_tokens - sequence.num_computed
        count = 1 if remaining == 1 else min(remaining, budget)
        if count > 0 and sequence.num_output_tokens < sequence.sampling.max_tokens:
            budget -= count if remaining > 1 else 0
            rows.append(BatchRow(sequence, sequence.num_computed, count))
    batch = Batch(tuple(rows))
    tokens = engine.run(batch).token_ids
    assert len(tokens) == len(batch.sampling_rows)
    sampling_rows = batch.sampling_rows
    for row in rows:
        row.sequence.num_computed = row.end
    for row, token in zip(sampling_rows, tokens, strict=True):
        row.sequence.token_ids.append(token)


def generate(
    engine: Engine,
    prompts: Many[list[int]],
    sampling: SamplingParams = GREEDY,
    *,
    budget: int = 10_000,
    order: int = 0,
) -> list[list[int]]:
    """Each prompt's ``max_tokens`` new tokens, all prompts together, chunked by ``budget``."""
    sequences = sequences_for(engine, prompts, sampling, order)
    while any(s.num_output_tokens < sampling.max_tokens for s in sequences):
        step(engine, sequences, budget)
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]
