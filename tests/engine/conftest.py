"""Checkpoints written once per session, one torch thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.checkpoints import CHECKPOINTS, write_checkpoint

CheckpointPath = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointPath:
    """The folder of a checkpoint of ``CHECKPOINTS``, by name."""
    directory = tmp_path_factory.mktemp("checkpoints")

    @cache
    def path(name: str) -> Path:
        return write_checkpoint(CHECKPOINTS[name], directory / name)

    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
