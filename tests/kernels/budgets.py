"""What each build may cost, as committed in ``budgets.json``.

``python -m tests.kernels.budgets`` compiles every build and rewrites the file. Figures depend on
the compiler, so the file names the version of Triton that they were read from.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import triton

from tests.kernels.builds import all_builds
from tests.kernels.compilation import Figures, compile_for_hopper

FILE = Path(__file__).with_name("budgets.json")
SLACK = 8  # registers: what an unrelated change to a kernel's text moves them by


def read() -> tuple[str, dict[str, Figures]]:
    """Triton's version, and the figures of each build."""
    content = json.loads(FILE.read_text())
    return content["triton"], {
        name: Figures(**figures) for name, figures in content["builds"].items()
    }


def worsened(figures: Figures, budget: Figures) -> list[str]:
    """In what ``figures`` exceed ``budget``, in words."""
    most = {"registers": budget.registers + SLACK, "shared": budget.shared, "stack": budget.stack}
    least = {"wgmma": budget.wgmma, "vector_loads": budget.vector_loads}
    found = asdict(figures)
    return [
        *(f"{name} {found[name]} > {bound}" for name, bound in most.items() if found[name] > bound),
        *(
            f"{name} {found[name]} < {bound}"
            for name, bound in least.items()
            if found[name] < bound
        ),
    ]


def rewrite() -> None:
    """Compile every build and store what it costs."""
    builds = {}
    for name, build in all_builds().items():
        builds[name] = asdict(compile_for_hopper(build))
        print(name, builds[name], flush=True)
    FILE.write_text(json.dumps({"triton": triton.__version__, "builds": builds}, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
