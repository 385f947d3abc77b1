"""Sequences whose output another worker began: they go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from protocol.sampling import SamplingParams
from tests.engine.driver import generate, sequences_for, step

PROMPT = [7, 9, 11, 7, 9]
NEW = 24
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=NEW, temperature=0.0),
    "seeded": SamplingParams(max_tokens=NEW, temperature=1.1, top_p=0.95, seed=3),
    "penalties": SamplingParams(
        max_tokens=NEW,
        temperature=0.0,
        repetition_penalty=1.2,
        presence_penalty=0.7,
        frequency_penalty=0.3,
    ),
    "late stop": SamplingParams(
        max_tokens=NEW, temperature=0.9, seed=4, min_tokens=NEW, stop_token_ids=tuple(range(100))
    ),
}


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Engine:
    return Engine.load(EngineConfig(str(checkpoint("llama")), device="cpu", num_blocks=128))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_output_does_not_depend_on_where_it_was_taken_over(
    engine: Engine, sampling: SamplingParams
) -> None:
    [expected] = generate(engine, [PROMPT], sampling)
    for known in (1, 10, 11, 12, NEW - 1):
        [sequence] = sequences_for(engine, [PROMPT + expected[:known]], sampling)
        sequence.num_prompt_tokens = len(PROMPT)
        while sequence.finish_reason() is None:
            step(engine, [sequence], budget=8)
        assert sequence.token_ids == PROMPT + expected


def test_what_is_handed_on_holds_nothing_of_the_last_blocks_former_owner(engine: Engine) -> None:
    engine.rows.normal_(std=50.0)
    sequence = Sequence("request", [1, 2, 3, 4, 5], 2, SamplingParams(max_tokens=9))
    sequence.block_table = [6]
    engine.run(Batch((BatchRow(sequence, 0, 5),)))
    block = engine.rows[6].view(engine.geometry.row_shape)
    assert block[:, :, :, :5].all(dim=-1).all()
    assert not block[:, :, :, 5:].any()
