"""One deployment of the demo model, shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stack import Stack


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them one after the other: each starts processes enough for two cores."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("e2e"))


@pytest.fixture(scope="package")
def demo() -> Iterator[Stack]:
    """Two workers in each pool, which is what load balancing and cancels have to cope with.

    In float32: bfloat16 rounds with the batch, and a near-tie of two tokens falls either way.
    """
    exact = ("--dtype", "float32")
    with Stack("demo", prefill=[(), ()], decode=[(), ()], worker=exact) as stack:
        yield stack
