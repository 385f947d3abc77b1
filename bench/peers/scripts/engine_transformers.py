"""transformers' continuous batching: paged KV, SDPA, its own scheduler in a thread.

Settings: bf16, KV pages of 256 tokens as by default, on a CPU up to 512 tokens a step (its SDPA
attends from every token of a step to the KV of every sequence of it, and masks: fewer is faster),
no shared pages as no two prompts share a prefix. On a GPU it uses graphs and its asynchronous loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from engine_loop import Setup, serve
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)

PAGE = 256  # tokens


def settings(setup: Setup) -> dict[str, Any]:
    return {
        "page_size": PAGE,
        "max_batch_tokens": setup.chunk,
        "allow_block_sharing": False,
        "use_cuda_graph": setup.device == "cuda",
        "use_async_batching": setup.device == "cuda",
    }


class Transformers:
    """A continuous batching manager behind ``engine_loop.Engine``."""

    def __init__(self, setup: Setup) -> None:
        how = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        with torch.device(setup.device):
            if setup.load_format == "dummy":
                config = AutoConfig.from_pretrained(setup.model)
                model = AutoModelForCausalLM.from_config(config, **how)
            else:
                model = AutoModelForCausalLM.from_pretrained(setup.model, **how)
        self._manager = model.eval().init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(num_blocks=setup.kv_tokens // PAGE, **settings(setup)),
        )
        self._manager.start()
        self._running: set[int] = set()

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        self._running.add(number)
        self._manager.add_request(prompt, str(number), output_tokens, streaming=True)

    def advance(self) -> Iterator[int]:
        output = self._manager.get_result(timeout=600)
        if output is None:
            raise RuntimeError("transformers gave no token")
        if output.error:
            raise RuntimeError(output.error)
        if int(output.request_id) in self._running:  # not a cancelled one's last token
            yield int(output.request_id)  # one output for each token

    def clear(self) -> None:
        for number in self._running:
            self._manager.cancel_request(str(number))
        self._running.clear()
        while self._manager.batch_processor.has_pending_requests():
            self._manager.get_result(timeout=0.05)


def load(setup: Setup) -> tuple[Transformers, dict[str, Any]]:
    torch.set_num_threads(setup.threads)
    return Transformers(setup), {"transformers": transformers.__version__, **settings(setup)}


if __name__ == "__main__":
    serve(load)
