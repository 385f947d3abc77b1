"""A dense 8B model on one GPU: engines alone, then prompts handed from one process to another.

kvferry's engine and transformers' continuous batching get the same shape (Llama 3.1 8B's), random
weights and prompts. Decode is held against the bytes of weights and KV over the bandwidth of a
large copy, prefill against its operations over the rate of a large matrix product. Then a prefill
and a decode worker share the GPU, as two processes with KV over CUDA IPC, behind the router: the
client's time to first token less what prefill computes is the overhead of the hand-off.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.deployment import serving
from bench.engine import Floors, num_weights, prefill_operations
from bench.latency import measure as measure_latency
from bench.models import write_shape
from bench.peers.compare import Measure, Peer, PeerError, compare
from bench.peers.engines import REPOSITORY, SCRIPTS, Decode, Prefill
from bench.peers.process import running
from bench.peers.record import Figures, Record
from engine.config import ModelConfig

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VALUE_BYTES = 2  # of bfloat16
START_TIMEOUT = 180.0  # seconds
ENGINES = {"kvferry": "engine_kvferry.py", "transformers": "engine_transformers.py"}
METRICS = ("tokens/s", "of the floor")
HAND_OFF = ("time_to_first_token", "prefill_compute", "handoff_overhead", "kv_transfer")


@dataclass(frozen=True, slots=True)
class HandOff:
    """Prompts of so many tokens, one at a time, through both workers."""

    tokens: int
    requests: int = 10

    def __str__(self) -> str:
        return f"prompt {self.tokens}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, on which device."""

    shape: dict[str, Any]  # config.json
    device: str
    cases: Sequence[Prefill | Decode]
    hand_offs: Sequence[HandOff]
    chunk: int  # prompt tokens of a step
    memory_share: float = 0.4  # of a GPU, for each of two workers

    @property
    def max_model_len(self) -> int:
        return max(case.tokens for case in self.hand_offs) + 1024

    @property
    def max_num_seqs(self) -> int:
        return max(case.sequences for case in self.cases if isinstance(case, Decode))


H200 = Plan(
    LLAMA_3_1_8B,
    "cuda",
    [Prefill(2048, 3), Prefill(8192, 3), *(Decode(count, 1024) for count in (1, 32, 128, 256))],
    [HandOff(2048), HandOff(8192), HandOff(32_768, 5)],
    chunk=8192,
)

TINY = Plan(
    LLAMA_3_1_8B
    | {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "cpu",
    [Prefill(512, 3), Decode(1, 64), Decode(8, 64)],
    [HandOff(512)],
    chunk=512,
)


def run(
    plan: Plan, folder: Path, floors: Floors, record: Record, bound: float, console: Console
) -> None:
    """Measure what the record lacks, each row for ``bound`` seconds at most, and show it.

    ``folder`` keeps the model's shape and the logs.
    """
    model = folder / "model"
    write_shape(model, plan.shape)
    config = ModelConfig.load(model)
    engines = [Peer(name, partial(_engine, name, plan, folder, config, floors)) for name in ENGINES]
    compare(engines, plan.cases, record, bound, console)
    system = Peer("kvferry, two workers", partial(_system, plan, model))
    compare([system], plan.hand_offs, record, bound, console)
    for metric in METRICS:
        console.print(record.table(metric, f"Engines: {metric}", "kvferry"))
    for part in HAND_OFF:
        console.print(record.table(f"{part}_ms", f"Hand-off: {part}, ms at p50", ""))
    for peer, reason in record.failures().items():
        console.print(f"[red]{peer}[/]: {reason}", highlight=False)


def seconds_at_least(case: Prefill | Decode, model: ModelConfig, floors: Floors) -> float:
    """The floor of one prompt, or of one decode step of all sequences."""
    weights = num_weights(model)
    if isinstance(case, Prefill):
        operations, size = prefill_operations(model, case.tokens), VALUE_BYTES * weights
    else:
        kv = case.sequences * case.context * _kv_token_bytes(model)
        operations, size = 2 * case.sequences * weights, VALUE_BYTES * weights + kv
    return max(operations / floors.flops, size / floors.read_bytes)


@contextlib.contextmanager
def _engine(
    name: str, plan: Plan, folder: Path, model: ModelConfig, floors: Floors, bound: float
) -> Iterator[tuple[dict[str, Any], Measure]]:
    setup = {
        "model": str(folder / "model"),
        "weights": "16-bit",
        "threads": 2,
        "vocab_size": model.vocab_size,
        "kv_tokens": max(case.kv_tokens for case in plan.cases),
        "kv_token_bytes": _kv_token_bytes(model),
        "max_model_len": plan.max_model_len,
        "chunk": plan.chunk,
        "max_num_seqs": plan.max_num_seqs,
        "device": plan.device,
        "load_format": "dummy",
    }
    command = [sys.executable, str(SCRIPTS / ENGINES[name]), json.dumps(setup)]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    cores = sorted(os.sched_getaffinity(0))
    with running(command, environment, cores, folder / f"{name}.log", answers=True) as process:
        about = process.ask(None, START_TIMEOUT)
        rate = process.measures("tokens/s", bound)

        def measure(case: Any) -> tuple[Figures, Any]:
            figures, runs = rate(case)
            tokens = case.tokens if isinstance(case, Prefill) else case.sequences
            least = seconds_at_least(case, model, floors)
            return figures | {"of the floor": figures["tokens/s"] * least / tokens}, runs

        yield about, measure


@contextlib.contextmanager
def _system(plan: Plan, model: Path, bound: float) -> Iterator[tuple[dict[str, Any], Measure]]:
    options = {
        "--load-format": "dummy",
        "--device": plan.device,
        "--disaggregation": "always",
        "--max-model-len": plan.max_model_len,
        "--max-num-batched-tokens": plan.chunk,
        "--gpu-memory-utilization": plan.memory_share,
    }
    words = [str(word) for option in options.items() for word in option]

    def measure(url: str, case: HandOff) -> tuple[Figures, Any]:
        runs = measure_latency(url, case.requests, case.tokens, output_tokens=8)
        return {f"{part}_ms": runs[f"{part}_ms"]["p50"] for part in HAND_OFF}, runs

    try:
        with serving(str(model), *words) as deployment:
            yield options, partial(measure, deployment.url)
    except RuntimeError as error:
        raise PeerError(str(error)) from error


def _kv_token_bytes(model: ModelConfig) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * VALUE_BYTES
