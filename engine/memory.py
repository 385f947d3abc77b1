"""How much memory KV may have: what the options give, less what weights and a step's work need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Batch, BatchRow
from engine.model import Model
from engine.model_runner import ModelRunner
from engine.sequence import Sequence
from protocol.errors import ConfigError
from protocol.geometry import KVGeometry
from protocol.sampling import SamplingParams

GIB, MIB = 1 << 30, 1 << 20
FREE_SHARE = 0.9  # of the host's free memory that KV may take
GPU_MARGIN = GIB  # for the CUDA context, kernels, graphs and fragmentation
EVERY_FILTER = SamplingParams(  # the sampling that needs the most memory
    max_tokens=1,
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=20,
    prompt_logprobs=20,
)


def host_budget(kv_cache_memory: float) -> int:
    """Bytes for KV on a CPU: ``kv_cache_memory`` GiB, or less where there is not that much."""
    return min(int(kv_cache_memory * GIB), int(FREE_SHARE * _free_host_memory()))


def gpu_budget(utilization: float, workspace: int, device: torch.device) -> int:
    """Bytes for KV on a GPU: the share asked for, less what is loaded and a step's workspace."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device)
    return min(int(utilization * total) - mine, free) - workspace - GPU_MARGIN


def step_workspace(
    model: Model, arena: Tensor, *, max_num_seqs: int, max_num_batched_tokens: int, graph_rows: int
) -> int:
    """Bytes that steps take on a GPU beside weights and KV: measured by running the largest ones.

    ``arena`` has one block, which all rows share. Captured graphs keep memory of their own: theirs
    comes on top.
    """

    def compute() -> None:
        num_tokens = max_num_seqs + max_num_batched_tokens
        batch = largest_batch(max_num_seqs, num_tokens, model.max_model_len)
        ModelRunner(model, arena).run(batch)

    def decode() -> None:
        batch = largest_batch(graph_rows, graph_rows, model.max_model_len)
        ModelRunner(model, arena, graph_rows).run(batch)

    return _peak_of(compute) + (_peak_of(decode) if graph_rows else 0)


def largest_batch(num_rows: int, num_tokens: int, max_model_len: int) -> Batch:
    """At least ``num_tokens`` new tokens in rows of equal length, in a KV arena of one block.

    All rows sample. They have fewer tokens only if each has ``max_model_len``.
    """
    each = min(-(-num_tokens // num_rows), max_model_len)
    rows = []
    for index in range(num_rows):
        sequence = Sequence(str(index), [0] * each, each, EVERY_FILTER, block_table=[0] * each)
        rows.append(BatchRow(sequence, 0, each))
    return Batch(tuple(rows))


def check_budget(geometry: KVGeometry, num_blocks: int, max_model_len: int) -> None:
    """Raise ConfigError when the pool cannot hold one sequence of ``max_model_len`` tokens."""
    needed = geometry.blocks_for(max_model_len)
    if num_blocks < needed:
        have, want = (size_text(count * geometry.row_bytes) for count in (num_blocks, needed))
        raise ConfigError(
            f"one sequence of {max_model_len} tokens needs {needed} KV blocks ({want}), there is "
            f"memory for {num_blocks} ({have}): lower max_model_len to at most "
            f"{num_blocks * geometry.block_size}, or give KV more memory"
        )


def size_text(num_bytes: int) -> str:
    """A number of bytes for a reader."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.2f} MiB"


def _peak_of(work: Callable[[], None]) -> int:
    """Bytes allocated on the GPU while ``work`` runs, at most, beyond those before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def _free_host_memory() -> int:
    """Bytes this process may still take: the host's, or its control group's where that is less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
            break
    else:
        raise ConfigError("/proc/meminfo does not say how much memory is available")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:  # no limit of our own
        return free
    return free if limit == "max" else min(free, int(limit) - used)
