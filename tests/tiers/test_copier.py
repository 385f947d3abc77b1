"""Copies between an arena and a tier, up to the first block that is not whole."""

from __future__ import annotations

import pytest
import torch

from engine.tiers.copier import BlockCopier
from engine.tiers.host import HostTier
from tests.tiers.blocks import name

NUM_BLOCKS, ELEMENTS = 40, 12  # 40 blocks make windows of 5
COUNT = 13


def arena() -> torch.Tensor:
    return torch.randn(NUM_BLOCKS, ELEMENTS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["one memory", "a window of its own"])
def copier(request: pytest.FixtureRequest) -> tuple[BlockCopier, torch.Tensor, HostTier]:
    """With an arena in host memory, and as with one elsewhere, whose window has a host half."""
    rows = arena()
    tier = HostTier(100 * 48, 48)
    made = BlockCopier(rows, tier)
    if request.param == "a window of its own":
        made._host = torch.empty_like(made._window)
        made._host_rows = made._host.view(torch.uint8).numpy()
    return made, rows, tier


def save(copier: BlockCopier, count: int = COUNT) -> None:
    for first in range(0, count, copier.window):
        numbers = range(first, min(first + copier.window, count))
        copier.store([name(number) for number in numbers], numbers)


def test_blocks_come_back_as_they_were_to_where_they_should(
    copier: tuple[BlockCopier, torch.Tensor, HostTier],
) -> None:
    made, rows, _ = copier
    assert made.window == 5
    before = rows.clone()
    save(made)
    blocks = [39 - number for number in range(COUNT)]
    assert made.load([name(number) for number in range(COUNT)], blocks) == COUNT
    assert torch.equal(rows[blocks], before[:COUNT])
    assert torch.equal(rows[:20], before[:20])


@pytest.mark.parametrize("bad", [0, 4, 5, 12])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_loading_ends_at_the_first_block_that_is_not_whole(
    copier: tuple[BlockCopier, torch.Tensor, HostTier], bad: int, how: str
) -> None:
    made, rows, tier = copier
    save(made)
    if how == "missing":
        tier.drop(name(bad))
    else:
        slot = tier.slots.find(name(bad))
        assert slot is not None
        tier._rows[slot, 7] ^= 1
    before = rows.clone()
    blocks = list(range(20, 20 + COUNT))
    assert made.load([name(number) for number in range(COUNT)], blocks) == bad
    assert torch.equal(rows[20 : 20 + bad], before[:bad])
    assert name(bad) not in tier
    assert tier.counters.refused["damaged"] == 1
