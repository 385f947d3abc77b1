"""llama.cpp through its C interface, on a GGUF file that ``export_gguf.py`` wrote.

Settings: compiled for this processor, flash attention, fp16 KV, one KV stream a sequence (each
attends to its own tokens only), its default batch sizes. To save minutes of prefill, the
sequences of a decode case get copies of the first one's KV: same bytes, each its own memory.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy
from engine_loop import Setup, serve

BATCH, MICRO_BATCH = 2048, 512  # tokens; llama.cpp's defaults
PREFILL_CONTEXT = 4608  # tokens


class LlamaCpp:
    """llama.cpp behind ``engine_loop.Engine``."""

    def __init__(self, path: str, threads: int) -> None:
        self._threads = threads
        model = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._one = self._new_context(1, PREFILL_CONTEXT)
        self._context, self._sequences = self._one, 1
        self._numbers: list[int] = []
        self._prompt: list[int] = []
        self._output_tokens = 0
        self._last: list[int] = []  # token of each sequence
        self._length = 0  # tokens of each sequence in the KV cache

    def _new_context(self, sequences: int, tokens: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * (-(-tokens // 256) * 256)
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp has no room for {sequences} × {tokens} tokens")
        return context

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        self._numbers.append(number)
        self._prompt = self._prompt or prompt
        self._output_tokens = output_tokens

    def advance(self) -> Iterator[int]:
        if self._last:
            self._step()
        else:
            self._prefill()
        yield from self._numbers

    def clear(self) -> None:
        if self._context is not self._one:
            llama_cpp.llama_free(self._context)
            self._context, self._sequences = self._one, 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._one), False)
        self._numbers, self._prompt, self._last = [], [], []

    def _prefill(self) -> None:
        sequences = len(self._numbers)
        if sequences > 1:
            tokens = len(self._prompt) + self._output_tokens
            self._context = self._new_context(sequences, tokens)
        for start in range(0, len(self._prompt), BATCH):
            part = self._prompt[start : start + BATCH]
            last = start + len(part) == len(self._prompt)
            positions = range(start, start + len(part))
            self._decode(part, list(positions), [0] * len(part), int(last))
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, sequences):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        self._last = self._newest(1) * sequences
        self._length = len(self._prompt)

    def _step(self) -> None:
        sequences = len(self._numbers)
        self._decode(self._last, [self._length] * sequences, list(range(sequences)), sequences)
        self._last = self._newest(sequences)
        self._length += 1

    def _decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], outputs: int
    ) -> None:
        """Compute tokens; the last ``outputs`` of them give logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(
            zip(tokens, positions, sequences, strict=True)
        ):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(tokens) - outputs
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")

    def _newest(self, rows: int) -> list[int]:
        """Each row's most likely token."""
        logits = llama_cpp.llama_get_logits(self._context)
        table = numpy.ctypeslib.as_array(logits, (rows, self._vocab_size))
        return table.argmax(axis=1).tolist()


def load(setup: Setup) -> tuple[LlamaCpp, dict[str, Any]]:
    about = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    settings = {"n_batch": BATCH, "n_ubatch": MICRO_BATCH, "flash_attn": True, "kv": "f16"}
    return LlamaCpp(setup.model, setup.threads), {**about, **settings}


if __name__ == "__main__":
    serve(load)
