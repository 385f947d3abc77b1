"""An engine: one model on one device with its KV arena. Token ids in, token ids out.

Knows neither prefill nor decode: which tokens a step computes is the scheduler's decision, where
their KV goes is the block tables'.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.batch import Batch
from engine.checkpoint import resolve_checkpoint
from engine.config import ModelConfig
from engine.model import Model
from engine.model_runner import ModelRunner
from engine.rope import canonical_text
from engine.weights import LoadFormat, ModelWeights, dummy_weights, load_weights
from protocol.errors import ConfigError
from protocol.geometry import DTYPE_BYTES, Fingerprint, KVDtype, KVGeometry

log = logging.getLogger(__name__)

GIB, MIB = 1 << 30, 1 << 20
CPU_BLOCK_SIZE, CUDA_BLOCK_SIZE = 16, 64  # tokens
WORKSPACE_TOKENS = 8192  # of one step, for which activations are set aside on a GPU
WORKSPACE_ROWS = 256  # sampled in one step, for which logits are set aside on a GPU
FREE_SHARE = 0.9  # of the host's free memory that KV may take

_TORCH_DTYPES: dict[KVDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load and how much memory to give it."""

    model: str  # local folder or hub id
    revision: str | None = None
    dtype: Literal["auto"] | KVDtype = "auto"  # of weights and KV; auto: the checkpoint's
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None  # tokens; None: the model's
    block_size: int | None = None  # tokens; None: 64 on CUDA, 16 on a CPU
    num_blocks: int | None = None  # None: what the memory options give
    kv_cache_memory: float = 1.0  # GiB, on a CPU
    gpu_memory_utilization: float = 0.9  # share of the GPU for weights, KV and workspace
    seed: int = 0  # of dummy weights
    num_threads: int | None = None  # of torch on a CPU; None: torch's choice


class Engine:
    """A loaded model. ``run`` must be called from one thread at a time."""

    model_config: ModelConfig
    geometry: KVGeometry
    fingerprint: Fingerprint
    max_model_len: int  # tokens
    num_blocks: int
    rows: Tensor  # the arena, [num_blocks, row elements]: what the transfer reads and writes

    def __init__(
        self,
        model_config: ModelConfig,
        weights: ModelWeights,
        fingerprint: Fingerprint,
        arena: Tensor,
        max_model_len: int,
    ) -> None:
        self.model_config = model_config
        self.geometry = fingerprint.geometry
        self.fingerprint = fingerprint
        self.max_model_len = max_model_len
        self.num_blocks = len(arena)
        self.rows = arena.view(self.num_blocks, -1)
        self._runner = ModelRunner(Model(model_config, weights, max_model_len), arena)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Find the checkpoint, load it and allocate the arena, zeroed.

        Raises ConfigError when the model, the device or the memory does not fit the request.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = _device(config)
        folder = resolve_checkpoint(
            config.model, weights=config.load_format == "auto", revision=config.revision
        )
        model_config = ModelConfig.load(folder)
        max_model_len = _max_model_len(config, model_config)
        geometry = _geometry(config, model_config, device)
        weights, digest = _weights(folder, config, model_config, geometry.dtype, device)
        num_blocks = _num_blocks(config, model_config, geometry, device)
        _check_budget(geometry, num_blocks, max_model_len)
        fingerprint = Fingerprint(
            weights_digest=digest, rope=canonical_text(model_config.rope), geometry=geometry
        )
        arena = _arena(geometry, num_blocks, device)
        log.info(
            "loaded %s on %s in %s: %d KV blocks of %d tokens, %s",
            config.model,
            device,
            geometry.dtype,
            num_blocks,
            geometry.block_size,
            _size(num_blocks * geometry.row_bytes),
        )
        return cls(model_config, weights, fingerprint, arena, max_model_len)

    @property
    def salt(self) -> bytes:
        """Separates block hashes of models that must not share KV; 64 bytes."""
        return hashlib.blake2b(self.fingerprint.model_dump_json().encode()).digest()

    def run(self, batch: Batch) -> list[int]:
        """Write the KV of every row's tokens; one new token per sampling row, in batch order."""
        return self._runner.run(batch)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device cuda: torch {torch.__version__} finds no usable CUDA GPU")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    wanted = config.max_model_len or limit
    if wanted > limit:
        raise ConfigError(f"max_model_len {wanted}: the model was made for {limit} tokens")
    return wanted


def _geometry(config: EngineConfig, model: ModelConfig, device: torch.device) -> KVGeometry:
    default = CUDA_BLOCK_SIZE if device.type == "cuda" else CPU_BLOCK_SIZE
    return KVGeometry(
        num_kv_heads=model.num_kv_heads,
        num_layers=model.num_layers,
        block_size=config.block_size or default,
        head_dim=model.head_dim,
        dtype=model.dtype if config.dtype == "auto" else config.dtype,
    )


def _weights(
    folder: Path, config: EngineConfig, model: ModelConfig, dtype: KVDtype, device: torch.device
) -> tuple[ModelWeights, str]:
    try:
        if config.load_format == "dummy":
            return dummy_weights(model, _TORCH_DTYPES[dtype], device, config.seed)
        return load_weights(folder, model, _TORCH_DTYPES[dtype], device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{config.model} does not fit the GPU: {error}") from error


def _num_blocks(
    config: EngineConfig, model: ModelConfig, geometry: KVGeometry, device: torch.device
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if device.type == "cuda":
        budget = _gpu_budget(config.gpu_memory_utilization, model, geometry, device)
    else:
        budget = min(int(config.kv_cache_memory * GIB), int(FREE_SHARE * _free_host_memory()))
    return max(0, budget) // geometry.row_bytes


def _gpu_budget(
    utilization: float, model: ModelConfig, geometry: KVGeometry, device: torch.device
) -> int:
    """Bytes for KV: the share asked for, less the weights just loaded and a step's workspace."""
    free, total = torch.cuda.mem_get_info(device)
    width = 4 * model.hidden_size + 3 * model.intermediate_size
    width += 3 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    activations = WORKSPACE_TOKENS * width * DTYPE_BYTES[geometry.dtype]
    logits = WORKSPACE_ROWS * model.vocab_size * 4 * DTYPE_BYTES["float32"]
    mine = torch.cuda.memory_reserved(device)
    return min(int(utilization * total) - mine, free) - activations - logits


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


def _check_budget(geometry: KVGeometry, num_blocks: int, max_model_len: int) -> None:
    needed = geometry.blocks_for(max_model_len)
    if num_blocks < needed:
        have, want = (_size(count * geometry.row_bytes) for count in (num_blocks, needed))
        raise ConfigError(
            f"one sequence of {max_model_len} tokens needs {needed} KV blocks ({want}), there is "
            f"memory for {num_blocks} ({have}): lower max_model_len to at most "
            f"{num_blocks * geometry.block_size}, or give KV more memory"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.2f} MiB"


def _arena(geometry: KVGeometry, num_blocks: int, device: torch.device) -> Tensor:
    shape = (num_blocks, *geometry.row_shape)
    try:
        return torch.zeros(shape, dtype=_TORCH_DTYPES[geometry.dtype], device=device)
    except RuntimeError as error:  # torch's out of memory, on a GPU or a CPU
        size = _size(num_blocks * geometry.row_bytes)
        raise ConfigError(f"cannot allocate {size} of KV: {error}") from error
