"""OpenVINO GenAI's continuous batching pipeline, stepped by hand.

The checkpoint is converted first, by optimum-intel. Settings: one stream for the lowest latency on
all threads; bf16 arithmetic, which a Zen 4 has; KV in bf16 beside 16-bit weights, and OpenVINO's
default, 8-bit KV, beside 8-bit weights.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator
from typing import Any

import numpy
import openvino
import openvino_genai
from engine_loop import Setup, serve

SCHEDULER = {
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 32,
    "dynamic_split_fuse": True,
    "enable_prefix_caching": False,
}


class OpenVINO:
    """OpenVINO GenAI behind ``engine_loop.Engine``."""

    def __init__(self, setup: Setup, properties: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = math.ceil(setup.kv_bytes / 2**30)
        for name, value in SCHEDULER.items():
            setattr(scheduler, name, value)
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            setup.model, scheduler, "CPU", properties
        )
        self._handles: dict[int, Any] = {}

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        generation = openvino_genai.GenerationConfig()
        generation.max_new_tokens = output_tokens
        generation.ignore_eos = True
        generation.do_sample = False
        tokens = openvino.Tensor(numpy.array([prompt], numpy.int64))
        self._handles[number] = self._pipeline.add_request(number, tokens, generation)

    def advance(self) -> Iterator[int]:
        self._pipeline.step()
        for number, handle in self._handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    for _ in output.generated_ids:
                        yield number

    def clear(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def load(setup: Setup) -> tuple[OpenVINO, dict[str, Any]]:
    """``setup.model`` is a converted checkpoint."""
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": setup.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    if setup.weights == "16-bit":
        properties["KV_CACHE_PRECISION"] = "bf16"
    about = {"openvino-genai": importlib.metadata.version("openvino-genai")}
    return OpenVINO(setup, properties), {**about, **properties, **SCHEDULER}


if __name__ == "__main__":
    serve(load)
