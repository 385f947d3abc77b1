"""Compiles and loads the C++ files beside this one: once per machine, when first needed.

The library is for this very processor, so it is compiled where it runs and kept in the user's
cache under a name made of everything that shapes it: sources, compiler and processor. Without a
compiler, or with ``KVFERRY_NATIVE=0``, callers use their torch twins.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch  # its OpenMP runtime must be the process's first, for the library to share it

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
COMPILE_TIMEOUT = 300.0  # seconds
SCRATCH = "compiling-"  # begins the names of folders in the cache that compilations are at work in

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in vectors.h
MAX_HEAD_DIM = 256  # kMaxHeadDim in attention.h
# The functions' arguments: p a pointer or None, i an int64_t, f a float. They return nothing.
SIGNATURES = {
    "digest_blocks": "ppiip",
    "copy_blocks": "ppppiiip",
    "add_rms_norm": "ipipipfppii",
    "decode_attention": "ipiipiiiiipipiiifip",
    "decoder_layers": "pp",
    "dequantize_blocks": "ippiiiiipp",
    "linear_bf16": "pipppiii",
    "linear_int8": "ipipppppiii",
    "prefill_attention": "piipiiiiipippiiifip",
    "quantize_blocks": "ippiiiiipp",
    "rms_norm": "ipipfpii",
    "rotate_and_write": "ipppfppppiiiipiiii",
    "silu_mul": "ippii",
}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; the log says why."""
    if os.environ.get("KVFERRY_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        log.warning("no C++ compiler (g++) was found: CPU kernels run in torch, which is slower")
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("the C++ kernels cannot be built, torch is used instead: %s", reason)
        return None


def load_for_products() -> ctypes.CDLL | None:
    """The library, or None also where torch multiplies bf16 matrices faster: oneDNN uses AMX."""
    return None if torch.cpu._is_amx_tile_supported() else load()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where the tensor's first element lies; None for none."""
    return None if tensor is None else tensor.data_ptr()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_C_TYPES[kind] for kind in arguments]
        function.restype = None
    return library


def _compiled(compiler: str) -> Path:
    """The library's file, compiled unless it is there."""
    sources = sorted(SOURCES.glob("*.cpp"))
    headers = sorted(SOURCES.glob("*.h"))
    identity = hashlib.blake2b(digest_size=16)
    for path in (*sources, *headers):
        identity.update(path.read_bytes())
    version = subprocess.run(  # noqa: S603 (the user's own compiler)
        [compiler, "--version"], capture_output=True, text=True, check=True
    )
    for part in (*FLAGS, version.stdout, _processor(), torch.__version__):
        identity.update(part.encode())
    folder = _cache_folder()
    library = folder / f"kernels-{identity.hexdigest()}.so"
    if not library.exists():
        log.info("compiling the C++ kernels for this processor")
        _remove_left_over(folder)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            built = Path(scratch) / library.name
            subprocess.run(  # noqa: S603 (the same)
                [compiler, *FLAGS, *map(str, sources), "-o", str(built)],
                capture_output=True,
                text=True,
                check=True,
                timeout=COMPILE_TIMEOUT,
            )
            built.replace(library)  # at once, whoever else is compiling it too
    return library


def _remove_left_over(folder: Path) -> None:
    """Folders of compilations that were killed: no other is at work for so long."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # it ends just now
            if time.time() - scratch.stat().st_mtime > 2 * COMPILE_TIMEOUT:
                shutil.rmtree(scratch, ignore_errors=True)


def _cache_folder() -> Path:
    """A folder that only this user can write to, for what is loaded from it runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kvferry"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written to by others")
    return folder


def _processor() -> str:
    """What ``-march=native`` looks at."""
    wanted = ("model name", "flags")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
