"""Every kernel compiles for sm_90 and keeps its values in registers. Needs no GPU."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.block_copy import block_copy_kernel
from kernels.gpu.decode_attention import combine_kernel, decode_attention_kernel
from kernels.gpu.digest import digest_kernel
from kernels.gpu.gumbel import gumbel_kernel
from kernels.gpu.prefill_attention import prefill_attention_kernel
from kernels.gpu.rms_norm import rms_norm_kernel
from kernels.gpu.rope import rope_kernel
from kernels.gpu.silu_mul import silu_mul_kernel
from kernels.gpu.write_kv import write_kv_kernel

SHARED_MEMORY = 227 * 1024  # bytes a program may use on sm_90

HEAD = {"HEAD_DIM": 128, "DIM_PADDED": 128}
QUERY_AND_KV = {"q": "*bf16", "kv": "*bf16", "block_tables": "*i32", "contexts": "*i32"}


@dataclass(frozen=True)
class Build:
    kernel: Any
    types: dict[str, str]  # of parameters; those not named are i32, divisible by 16
    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3


BUILDS = {
    "decode attention": Build(
        decode_attention_kernel,
        QUERY_AND_KV
        | {"item_rows": "*i32", "item_starts": "*i32", "out": "*fp32", "peaks": "*fp32"}
        | {"totals": "*fp32", "scale": "fp32"},
        HEAD
        | {"WINDOW": 0, "GROUP": 4, "GROUP_PADDED": 16, "BLOCK_SIZE": 64}
        | {"CHUNK": 512, "TILE": 64, "SINGLE": False, "UPCAST": False},
    ),
    "decode combination": Build(
        combine_kernel,
        {
            "sums": "*fp32",
            "peaks": "*fp32",
            "totals": "*fp32",
            "row_starts": "*i32",
            "out": "*bf16",
        },
        HEAD | {"UPCAST": False},
    ),
    "prefill attention": Build(
        prefill_attention_kernel,
        QUERY_AND_KV
        | {"query_starts": "*i32", "tile_rows": "*i32", "tile_starts": "*i32", "out": "*bf16"}
        | {"scale": "fp32"},
        HEAD
        | {"WINDOW": 0, "GROUP": 4, "BLOCK_SIZE": 64, "BLOCK_M": 128, "BLOCK_N": 64}
        | {"UPCAST": False},
        num_warps=8,
        num_stages=2,
    ),
    "write kv": Build(
        write_kv_kernel,
        {"k": "*bf16", "v": "*bf16", "kv": "*bf16", "slots": "*i64"},
        HEAD | {"HEADS": 8, "HEADS_PADDED": 8, "BLOCK_SIZE": 64},
    ),
    "block copy": Build(
        block_copy_kernel,
        {"rows": "*i64", "packed": "*i64", "block_ids": "*i64"},
        {"N": 1 << 18, "LANES": 2048, "SCATTER": False},
    ),
    "digest": Build(
        digest_kernel,
        {"rows": "*i64", "block_ids": "*i64", "sums": "*i64"},
        {"N": 1 << 18, "LANES": 2048},
    ),
    "rms norm": Build(
        rms_norm_kernel,
        dict.fromkeys(("x", "residual", "weight", "total", "out"), "*bf16") | {"eps": "fp32"},
        {"N": 4096, "INNER": 1, "PADDED": 4096, "ADD": True, "UPCAST": False},
        num_warps=8,
    ),
    "rope": Build(
        rope_kernel,
        dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"},
        {"Q_HEADS": 32, "Q_PADDED": 32, "K_HEADS": 8, "K_PADDED": 8}
        | {"HALF": 64, "HALF_PADDED": 64, "UPCAST": False},
    ),
    "silu mul": Build(
        silu_mul_kernel,
        {"gate_up": "*bf16", "out": "*bf16"},
        {"N": 14336, "COLUMNS": 1024, "UPCAST": False},
    ),
    "gumbel": Build(
        gumbel_kernel,
        {"seeds": "*i64", "positions": "*i64", "out": "*fp32"},
        {"COLUMNS": 1024},
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_kernel_compiles_for_hopper_without_spills(name: str, tmp_path: Path) -> None:
    build = BUILDS[name]
    names = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "i32")
        for name in names
    }
    assert set(build.types) | set(build.constants) <= set(names)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, type_ in enumerate(signature.values())
        if type_.startswith("*") or type_ == "i32"
    }
    compiled = triton.compile(
        ASTSource(build.kernel, signature, build.constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": True,
        },
    )
    assert compiled.metadata.shared <= SHARED_MEMORY
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "STACK:0 " in report, report  # spilled registers would lie on the stack
