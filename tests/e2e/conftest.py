"""One deployment of the demo model, shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stack import Stack


@pytest.fixture(scope="package")
def demo() -> Iterator[Stack]:
    """Two workers in each pool, which is what load balancing and cancels have to cope with."""
    with Stack("demo", prefill=[(), ()], decode=[(), ()]) as stack:
        yield stack
