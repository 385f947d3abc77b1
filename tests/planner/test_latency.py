"""What a step costs: fits, tables, and fitting to timed steps."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from pydantic import ValidationError

from planner.fit import StepSample, fit_latency, relative_errors
from planner.latency import DecodeFit, LinearLatency, PrefillFit, TableLatency
from protocol.errors import ConfigError

LINEAR = LinearLatency(
    prefill=PrefillFit(fixed=2e-3, per_token=16e-6, per_square=7e-10),
    decode=DecodeFit(fixed=5e-3, per_context=3e-8, per_row=9e-6),
)
TABLE = TableLatency(
    tokens=(100, 200, 400),
    prefill=(1.0, 2.0, 6.0),
    batches=(1, 8),
    contexts=(100, 300),
    decode=((0.1, 0.3), (0.8, 1.0)),
    per_history=0.001,
)


def test_a_prompt_costs_its_chunks_and_a_fixed_part_for_each() -> None:
    whole = LINEAR.step_seconds(1000, 1000**2, 0, 0)
    chunks = [LINEAR.step_seconds(500, 500**2, 0, 0), LINEAR.step_seconds(500, 750_000, 0, 0)]
    assert whole == pytest.approx(2e-3 + 16e-3 + 7e-4)
    assert sum(chunks) == pytest.approx(whole + 2e-3)


def test_a_mixed_step_reads_the_weights_once() -> None:
    rows = 3e-8 * 4000 + 9e-6 * 4
    assert LINEAR.step_seconds(0, 0, 4, 4000) == pytest.approx(5e-3 + rows)
    assert LINEAR.step_seconds(1000, 1000**2, 4, 4000) == pytest.approx(18.7e-3 + rows)
    assert LINEAR.step_seconds(10, 100, 4, 4000) == pytest.approx(5e-3 + rows)


@pytest.mark.parametrize(
    ("tokens", "squares", "batch", "context", "seconds"),
    [
        (200, 200**2, 0, 0, 2.0),
        (300, 300**2, 0, 0, 4.0),
        (50, 50**2, 0, 0, 1.0),
        (600, 600**2, 0, 0, 10.0),
        (100, 300**2 - 200**2, 0, 0, 1.0 + 0.001 * 100 * 200),
        (0, 0, 1, 200, 0.2),
        (0, 0, 8, 8 * 300, 1.0),
        (0, 0, 15, 15 * 100, 1.5),
        (200, 200**2, 8, 8 * 100, 2.7),
    ],
)
def test_a_table_is_interpolated(
    tokens: int, squares: int, batch: int, context: int, seconds: float
) -> None:
    assert TABLE.step_seconds(tokens, squares, batch, context) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens": (100, 100, 400)}, "tokens must be increasing"),
        ({"prefill": (1.0, 2.0)}, "2 times for 3 tokens"),
        ({"decode": ((0.1, 0.3),)}, "a row for each batch"),
        ({"decode": ((0.1, 0.3), (0.0, 1.0))}, "greater than 0"),
    ],
)
def test_a_table_that_is_no_grid_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TableLatency.model_validate({**TABLE.model_dump(), **change})


def test_a_step_without_cost_is_refused() -> None:
    free = PrefillFit(fixed=0, per_token=0, per_square=0)
    with pytest.raises(ValidationError, match="must take time"):
        LinearLatency(prefill=free, decode=LINEAR.decode)


def samples(noise: float) -> list[StepSample]:
    random = Random(1)
    cases = [(n, n * n, 0, 0) for n in (64, 256, 1024, 4096)]
    cases += [(0, 0, rows, rows * each) for rows in (1, 8, 64) for each in (128, 2048)]
    return [
        StepSample(*case, LINEAR.step_seconds(*case) * (1 + noise * random.uniform(-1, 1)))
        for case in cases
    ]


def test_a_fit_finds_the_model_that_made_the_steps() -> None:
    fit = fit_latency(samples(noise=0))
    assert fit.prefill.model_dump() == pytest.approx(LINEAR.prefill.model_dump(), rel=1e-6)
    assert fit.decode.model_dump() == pytest.approx(LINEAR.decode.model_dump(), rel=1e-6)


def test_a_fit_of_noisy_steps_is_no_further_off_than_the_noise() -> None:
    noisy = samples(noise=0.05)
    assert np.abs(relative_errors(fit_latency(noisy), noisy)).max() < 0.1


def test_a_fit_has_no_negative_term() -> None:
    shrinking = [StepSample(n, n * n, 0, 0, n**0.5) for n in (1, 4, 16, 64, 256)]
    fit = fit_latency([*shrinking, *samples(noise=0)[4:]])
    assert fit.prefill.per_square == 0 < fit.prefill.per_token


def test_a_fit_needs_enough_different_steps() -> None:
    with pytest.raises(ConfigError, match="a decode fit needs 3 different steps, got 2"):
        fit_latency(samples(noise=0)[:6])
