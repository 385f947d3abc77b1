"""One torch thread, and the halves of an operation that a module tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.implementation import INTERPRETED, without_compiler


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["triton"] if INTERPRETED else ["native", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the C++ library and without; in the interpreter, once."""
    if request.param == "torch":
        without_compiler(monkeypatch)
