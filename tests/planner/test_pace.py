"""How simulated steps vary around the latency model."""

from __future__ import annotations

import numpy as np
import pytest

from engine.step_sums import SPELL
from planner.latency import Variation
from planner.pace import Pace
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import Detail, simulate
from planner.workload import Lengths, generate
from tests.planner.profiles import profile

VARIED = Variation(prefill_variation=0.4, decode_variation=0.3)


def prompt_factors(pace: Pace, count: int) -> list[float]:
    factors = []
    for _ in range(count):
        assert pace.begin(True, 1) == 1
        factors.append(pace.factor)
        pace.end(1)
    return factors


def test_prompt_steps_vary_each_for_itself() -> None:
    factors = prompt_factors(Pace(VARIED, 0), 20_000)
    assert np.mean(factors) == pytest.approx(1.0, abs=0.02)
    assert np.std(factors) == pytest.approx(0.4, rel=0.05)
    assert len(set(factors)) == len(factors)


def test_decode_steps_share_a_factor_for_a_spell() -> None:
    pace, factors, runs = Pace(VARIED, 0), [], []
    while len(factors) < 20_000:
        runs.append(pace.begin(False, 20))
        factors.append(pace.factor)
        pace.end(runs[-1])
    assert runs[:4] == [20, SPELL - 20, 20, SPELL - 20]
    assert factors[::2] == factors[1::2]
    assert np.std(factors[::2]) == pytest.approx(0.3, rel=0.05)


def test_a_spell_goes_on_after_a_step_with_prompts() -> None:
    pace = Pace(VARIED, 0)
    pace.begin(False, 1)
    spell = pace.factor
    pace.end(1)
    prompt_factors(pace, 5)
    assert pace.begin(False, 100) == SPELL - 1
    assert pace.factor == spell


def test_seeds_decide() -> None:
    assert prompt_factors(Pace(VARIED, 1), 9) == prompt_factors(Pace(VARIED, 1), 9)
    assert prompt_factors(Pace(VARIED, 1), 9) != prompt_factors(Pace(VARIED, 2), 9)


def test_without_variation_all_take_what_the_model_says() -> None:
    pace = Pace(Variation(), 0)
    assert prompt_factors(pace, 3) == [1.0] * 3
    assert pace.begin(False, 1000) == 1000
    assert pace.factor == 1.0


@pytest.mark.parametrize("detail", ["exact", "fast"])
def test_variation_widens_what_is_predicted_and_leaves_the_mean(detail: Detail) -> None:
    steady = profile(fixed=1e-3, per_token=1e-4)
    latency = steady.latency.model_copy(update=VARIED.model_dump())
    varied = steady.model_copy(update={"latency": latency})
    requests = list(generate(rate=2, count=500, prompt=Lengths(100), output=Lengths(41)))

    def tpot(worker: WorkerProfile) -> np.ndarray:
        return simulate(requests, Placement(prefill=1, decode=1), worker, detail=detail).tpot

    assert tpot(varied).mean() == pytest.approx(tpot(steady).mean(), rel=0.05)
    assert np.percentile(tpot(varied), 90) > 1.2 * np.percentile(tpot(steady), 90)
    assert list(tpot(varied)) == list(tpot(varied))
