"""The import contract, checked from outside: by the linter and in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "cli",
    "decode",
    "engine",
    "kernels",
    "kvtransfer",
    "planner",
    "prefill",
    "protocol",
    "router",
)
MAX_LINES = 450

WITHOUT_TORCH = [
    "prefill.scheduler",
    "prefill.handoff",
    "decode.scheduler",
    "decode.admission",
    "engine.batch",
    "engine.block_pool",
    "engine.sequence",
    "engine.step",
    *(
        f"{package}.{path.stem}"
        for package in ("planner", "protocol", "router")
        for path in sorted((ROOT / package).glob("*.py"))
        if path.stem != "__init__"
    ),
]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_run_one_way() -> None:
    lint = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    result = python("-c", lint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_the_router_and_all_policy_load_without_torch() -> None:
    program = f"""
import importlib, sys
for name in {WITHOUT_TORCH!r}:
    importlib.import_module(name)
    for heavy in ("torch", "triton", "ucxx"):
        assert heavy not in sys.modules, f"{{name}} imports {{heavy}}"
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_ours(package: str) -> None:
    program = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
    result = python("-c", program)
    assert Path(result.stdout.strip()) == ROOT / package / "__init__.py"


def test_every_module_says_what_it_is_for_and_stays_small() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text()
            assert source.startswith(('"""', 'r"""')), f"{path} has no docstring"
            assert source.count("\n") <= MAX_LINES, f"{path} is more than one room"
