"""An engine: one model on one device with its KV arena. Token ids in, token ids out.

Knows neither prefill nor decode: which tokens a step computes is the scheduler's decision, where
their KV goes is the block tables'.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.batch import Batch, StepOutput
from engine.checkpoint import resolve_checkpoint
from engine.config import ModelConfig
from engine.grammar import Grammars
from engine.memory import check_budget, gpu_budget, host_budget, size_text, step_workspace
from engine.model import Model
from engine.model_runner import ModelRunner
from engine.profiling import StepTrace
from engine.rope import canonical_text
from engine.weights import (
    LoadFormat,
    ModelWeights,
    Quantization,
    dummy_weights,
    load_weights,
    pack_weights,
)
from kernels.cpu.memory import private_zeros
from kernels.linear import Weight
from kernels.shared_memory import shared_zeros
from protocol.errors import ConfigError
from protocol.geometry import Fingerprint, KVDtype, KVGeometry, WireQuantization
from protocol.sampling import Grammar

log = logging.getLogger(__name__)

CPU_BLOCK_SIZE, CUDA_BLOCK_SIZE = 16, 64  # tokens

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
    quantization: Quantization | None = None  # of weights and activations, on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None  # tokens; None: the model's
    block_size: int | None = None  # tokens; None: 64 on CUDA, 16 on a CPU
    num_blocks: int | None = None  # None: what the memory options give
    kv_cache_memory: float = 1.0  # GiB, on a CPU
    shared_kv: bool = False  # other processes of the host may map it: no huge pages, on a CPU
    wire_quantization: WireQuantization = "none"  # of KV between workers: all must agree
    gpu_memory_utilization: float = 0.9  # share of the GPU for weights, KV and workspace
    max_num_seqs: int = 64  # rows of the largest step, for which a GPU keeps memory free
    max_num_batched_tokens: int = 512  # prompt tokens of that step
    decode_graphs: bool = False  # capture decode steps, on a GPU
    seed: int = 0  # of dummy weights
    num_threads: int | None = None  # of torch on a CPU; None: torch's choice
    profile: Path | None = None  # where a trace of some steps goes
    profile_steps: int = 20


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
        fingerprint: Fingerprint,
        max_model_len: int,
        rows: Tensor,
        runner: ModelRunner,
        grammars: Grammars,
        trace: StepTrace | None,
    ) -> None:
        self.model_config = model_config
        self.geometry = fingerprint.geometry
        self.fingerprint = fingerprint
        self.max_model_len = max_model_len
        self.num_blocks = len(rows)
        self.rows = rows
        self._runner = runner
        self._grammars = grammars
        self._trace = trace

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
        _warn_if_slow(geometry.dtype, device)
        weights, digest = _weights(folder, config, model_config, geometry.dtype, device)
        model = Model(model_config, weights, max_model_len)
        graph_rows = config.max_num_seqs if config.decode_graphs and device.type == "cuda" else 0
        num_blocks = _num_blocks(config, model, geometry, device, graph_rows)
        check_budget(geometry, num_blocks, max_model_len)
        arena = _arena(geometry, num_blocks + bool(graph_rows), device, shared=config.shared_kv)
        grammars = Grammars(folder, model_config.vocab_size, model_config.eos_token_ids)
        runner = ModelRunner(model, arena, graph_rows, grammars)
        runner.capture()
        log.info(
            "loaded %s on %s in %s: %d KV blocks of %d tokens, %s",
            config.model,
            device,
            geometry.dtype,
            num_blocks,
            geometry.block_size,
            size_text(num_blocks * geometry.row_bytes),
        )
        return cls(
            model_config,
            Fingerprint(
                weights_digest=digest,
                rope=canonical_text(model_config.rope),
                geometry=geometry,
                wire_quantization=config.wire_quantization,
            ),
            max_model_len,
            arena[:num_blocks].view(num_blocks, -1),
            runner,
            grammars,
            StepTrace(config.profile, config.profile_steps) if config.profile else None,
        )

    @property
    def salt(self) -> bytes:
        """Separates block hashes of models that must not share KV; 64 bytes."""
        return self.fingerprint.block_salt

    def expect(self, grammar: Grammar) -> None:
        """Begin to compile a grammar: a step that needs it waits for it. From any thread."""
        self._grammars.expect(grammar)

    def run(self, batch: Batch) -> StepOutput:
        """Write the KV of every row's tokens; one new token per sampling row, in batch order."""
        if self._trace is None:
            return self._runner.run(batch)
        self._trace.before_step()
        output = self._runner.run(batch)
        self._trace.after_step()
        return output

    @property
    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds of the last step's phases: prepare, forward and sample."""
        return self._runner.phases.seconds


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
) -> tuple[ModelWeights[Weight], str]:
    if config.quantization is not None and device.type != "cpu":
        raise ConfigError(f"quantization {config.quantization} runs on a CPU, not on {device}")
    try:
        if config.load_format == "dummy":
            loaded = dummy_weights(model, _TORCH_DTYPES[dtype], device, config.seed)
        else:
            loaded = load_weights(folder, model, _TORCH_DTYPES[dtype], device)
        return pack_weights(*loaded, config.quantization)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{config.model} does not fit the GPU: {error}") from error


def _warn_if_slow(dtype: KVDtype, device: torch.device) -> None:
    short = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if device.type != "cpu" or short is None:
        return
    able = torch.cpu.get_capabilities()
    if not any(able[name] for name in able if name.endswith(short)):
        log.warning("no instructions for %s here: dtype float32 may be faster", dtype)


def _num_blocks(
    config: EngineConfig, model: Model, geometry: KVGeometry, device: torch.device, graph_rows: int
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if device.type == "cpu":
        budget = host_budget(config.kv_cache_memory)
    else:
        workspace = _workspace(config, model, geometry, device, graph_rows)
        budget = gpu_budget(config.gpu_memory_utilization, workspace, device)
    return max(0, budget) // geometry.row_bytes


def _workspace(
    config: EngineConfig, model: Model, geometry: KVGeometry, device: torch.device, graph_rows: int
) -> int:
    try:
        workspace = step_workspace(
            model,
            _arena(geometry, 1, device),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            graph_rows=graph_rows,
        )
    except torch.OutOfMemoryError as error:
        limits = f"max_num_seqs {config.max_num_seqs}"
        limits += f" and max_num_batched_tokens {config.max_num_batched_tokens}"
        raise ConfigError(f"a step of {limits} does not fit the GPU: {error}") from error
    log.info("a step takes up to %s beside weights and KV", size_text(workspace))
    return workspace


def _arena(
    geometry: KVGeometry, num_blocks: int, device: torch.device, *, shared: bool = False
) -> Tensor:
    shape, dtype = (num_blocks, *geometry.row_shape), _TORCH_DTYPES[geometry.dtype]
    try:
        if device.type == "cpu":
            return (shared_zeros if shared else private_zeros)(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # torch's out of memory, on a GPU or a CPU
        size = size_text(num_blocks * geometry.row_bytes)
        raise ConfigError(f"cannot allocate {size} of KV: {error}") from error
