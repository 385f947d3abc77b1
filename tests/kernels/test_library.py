"""Where the compiled kernels are kept."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from kernels.cpu import library

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty; what is compiled is one short file."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "short.cpp").write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvferry"


def test_a_compilation_leaves_its_library_and_removes_what_killed_ones_left(cache: Path) -> None:
    killed, at_work = cache / "compiling-killed", cache / "compiling-now"
    for scratch in (killed, at_work):
        scratch.mkdir(mode=0o700, parents=True)
        (scratch / "half.so").touch()
    long_ago = time.time() - 3 * library.COMPILE_TIMEOUT
    os.utime(killed, (long_ago, long_ago))
    cache.chmod(0o700)
    assert COMPILER is not None
    built = library._compiled(COMPILER)
    assert set(cache.iterdir()) == {built, at_work}
    before = built.stat()
    assert library._compiled(COMPILER) == built
    assert built.stat() == before, "it was compiled once"
