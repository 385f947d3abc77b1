"""Every build compiles for sm_90, keeps its values in registers and stays within its budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton

from tests.kernels import budgets
from tests.kernels.builds import all_builds
from tests.kernels.compilation import (
    REGISTERS,
    RESERVED_SHARED,
    SHARED_MEMORY,
    Figures,
    compile_for_hopper,
)

BUILDS = all_builds()


@pytest.mark.parametrize("name", BUILDS)
def test_build(name: str) -> None:
    build = BUILDS[name]
    figures = compile_for_hopper(build)
    assert figures.stack == 0  # spilled registers would lie there
    assert (figures.shared + RESERVED_SHARED) * build.programs_per_sm <= SHARED_MEMORY
    assert figures.registers * build.num_warps * 32 * build.programs_per_sm <= REGISTERS
    if build.wgmma:
        assert figures.wgmma
    if build.vector_loads:
        assert figures.vector_loads
    version, budget = budgets.read()
    assert name in budget, "python -m tests.kernels.budgets adds a new build"
    if version == triton.__version__:
        assert not budgets.worsened(figures, budget[name])


def test_no_budget_without_a_build() -> None:
    assert budgets.read()[1].keys() == BUILDS.keys()


def test_what_counts_as_worse() -> None:
    budget = Figures(registers=100, shared=1000, wgmma=8, vector_loads=4, stack=0)
    assert not budgets.worsened(budget, budget)
    assert not budgets.worsened(replace(budget, registers=90, vector_loads=5), budget)
    assert budgets.worsened(replace(budget, registers=109), budget) == ["registers 109 > 108"]
    assert budgets.worsened(replace(budget, shared=1001, stack=8), budget) == [
        "shared 1001 > 1000",
        "stack 8 > 0",
    ]
    assert budgets.worsened(replace(budget, wgmma=0), budget) == ["wgmma 0 < 8"]
