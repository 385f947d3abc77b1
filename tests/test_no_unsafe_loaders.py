"""Nothing that runs code out of data: no pickle and its kin, no eval, no unsafe ``torch.load``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(
    path.parent.name
    for path in ROOT.glob("*/__init__.py")
    if path.parent.name not in ("bench", "tests")
)
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    "torch.load",  # unless weights_only=True
    "numpy.load",  # unless allow_pickle=False
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
}
SAFE_WITH = {"weights_only": True, "allow_pickle": False}


def unsafe(source: str) -> Iterator[str]:
    """What a module must not have, each with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names if name.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                found = [module]
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                found = [name]
            case ast.Call(func=ast.Attribute() as called) if ast.unparse(called) in UNSAFE_CALLS:
                safe = any(
                    isinstance(given.value, ast.Constant)
                    and SAFE_WITH.get(given.arg or "") is given.value.value
                    for given in node.keywords
                )
                found = [] if safe else [ast.unparse(called)]
            case ast.Attribute(attr="allow_pickle" | "recv_pyobj" | "send_pyobj" as name):
                found = [name]
            case _:
                continue
        yield from (f"{name} in line {node.lineno}" for name in found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_loads_unsafely(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not list(unsafe(path.read_text())), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from shelve import open",
        "import torch.utils, dill.source",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "socket.recv_pyobj()",
    ],
)
def test_what_is_unsafe_is_found(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "class Child:\n    def exec(self): ...",
    ],
)
def test_what_is_safe_is_not(source: str) -> None:
    assert not list(unsafe(source))
