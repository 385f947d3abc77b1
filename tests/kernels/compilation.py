"""Compiles kernels for sm_90 and reads what became of them. Needs no GPU.

A build is a kernel with one set of constants and argument types, as a launcher would compile it.
``tests/kernels/builds`` holds one table of builds per kernel module.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 228 * 1024  # bytes of one multiprocessor
RESERVED_SHARED = 1024  # bytes of it that each program takes on top of its own
REGISTERS = 64 * 1024  # of one multiprocessor

# 16 bytes a thread, straight to registers or asynchronously to shared memory, or a whole tile.
VECTOR_LOAD = re.compile(
    r"\bld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|b128)\b"
    r"|\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (?:16|0x10)\b"
    r"|\bcp\.async\.bulk\.tensor"
)
WGMMA = re.compile(r"\bwgmma\.mma_async\b")


@dataclass(frozen=True)
class Build:
    kernel: Any
    types: Mapping[str, str]  # of parameters; those not named are i32, divisible by 16
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    wgmma: bool = False  # the kernel is bound by arithmetic: it must use Hopper's matrix units
    vector_loads: bool = True  # the kernel is bound by memory: it must load 16 bytes a thread
    programs_per_sm: int = 1  # that must fit side by side on one multiprocessor


@dataclass(frozen=True)
class Figures:
    """What a build costs. More registers and shared memory are worse, fewer of the others."""

    registers: int  # of a thread
    shared: int  # bytes of a program
    wgmma: int  # instructions in the program text
    vector_loads: int
    stack: int  # bytes of a thread: spilled registers lie on the stack


def compile_for_hopper(build: Build) -> Figures:
    """Raises ValueError when the build names parameters that the kernel does not have."""
    names = build.kernel.arg_names
    unknown = (build.types.keys() | build.constants.keys()) - set(names)
    if unknown:
        raise ValueError(f"{build.kernel.__name__} has no parameter {', '.join(sorted(unknown))}")
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "i32")
        for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, type_ in enumerate(signature.values())
        if type_.startswith("*") or type_ == "i32"
    }
    compiled = triton.compile(
        ASTSource(build.kernel, signature, dict(build.constants), aligned),
        target=HOPPER,
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": build.enable_fp_fusion,
        },
    )
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return Figures(
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        wgmma=len(WGMMA.findall(ptx)),
        vector_loads=len(VECTOR_LOAD.findall(ptx)),
        stack=usage["STACK"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)\b", report)}
