"""Chaos scenarios, one seed each.

Those of two workers in each pool are left out: test_failover and test_membership kill, freeze,
drain and restart the same processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos import settings
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.scene import CannotPlayError, Scene
from tests.checkpoints import CHECKPOINTS, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def hosts(model: Path) -> Iterator[Scene]:
    with ExitStack() as opened:
        try:
            scene = opened.enter_context(settings.hosts(model))
        except CannotPlayError as error:
            pytest.skip(str(error))
        yield scene


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Scene]:
    with settings.small(model) as scene:
        yield scene


def played_on(setting: settings.Setting) -> pytest.MarkDecorator:
    """Parametrises a test by the scenarios of a setting."""
    chosen = [scenario for scenario in SCENARIOS if scenario.setting is setting]
    return pytest.mark.parametrize("scenario", chosen, ids=[s.name for s in chosen])


def play(scenario: Scenario, scene: Scene) -> None:
    try:
        figures = scenario.play(scene, seed=0)
    except CannotPlayError as error:
        pytest.skip(str(error))
    assert figures.broken == [], figures


@played_on(settings.hosts)
def test_lines_between_hosts(hosts: Scene, scenario: Scenario) -> None:
    play(scenario, hosts)


@played_on(settings.small)
def test_queues_that_fill(small: Scene, scenario: Scenario) -> None:
    play(scenario, small)
