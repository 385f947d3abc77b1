"""Fixtures of the transfer tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def loopback_only() -> Iterator[None]:
    """Keep a module's processes off interfaces that others add or remove meanwhile.

    UCX lists the interfaces when a process starts and may use several for one peer. While some
    came and went, two processes were seen not to agree on them ("no remote ep address").
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("UCX_NET_DEVICES", "lo")
        yield
