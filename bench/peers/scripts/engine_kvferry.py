"""kvferry's engine behind the same interface as its peers': prompts in chunks, then decode steps.

Rows and blocks are laid out as its schedulers do: prefill alone, so many tokens a step (by default
as by ``--max-num-batched-tokens``), then every sequence one token a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from engine_loop import Setup, serve

from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from protocol.sampling import SamplingParams


class Kvferry:
    """kvferry's engine behind ``engine_loop.Engine``."""

    def __init__(self, setup: Setup) -> None:
        config = EngineConfig(
            model=setup.model,
            num_threads=setup.threads,
            kv_cache_memory=setup.kv_bytes / 2**30,
            max_model_len=setup.max_model_len,
            max_num_batched_tokens=setup.chunk,
            max_num_seqs=setup.max_num_seqs,
            device=setup.device,
            load_format=setup.load_format,
            decode_graphs=True,
            quantization="int8" if setup.weights == "8-bit" else None,
        )
        self._engine = Engine.load(config)
        self._chunk = setup.chunk
        self._sequences: list[Sequence] = []
        self._used_blocks = 0

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
        count = self._engine.geometry.blocks_for(len(prompt) + output_tokens)
        blocks = list(range(self._used_blocks, self._used_blocks + count))
        self._used_blocks += count
        self._sequences.append(Sequence(str(number), prompt, len(prompt), sampling, blocks))

    def advance(self) -> Iterator[int]:
        rows: list[BatchRow] = []
        room = self._chunk
        for sequence in self._sequences:
            left = sequence.num_prompt_tokens - sequence.num_computed
            if left > 0 and room > 0:
                rows.append(BatchRow(sequence, sequence.num_computed, min(left, room)))
                room -= rows[-1].num_tokens
        if not rows:
            rows = [BatchRow(s, s.num_computed, 1) for s in self._sequences]
        batch = Batch(tuple(rows))
        tokens = self._engine.run(batch).token_ids
        for row in rows:
            row.sequence.num_computed = row.end
        for row, token in zip(batch.sampling_rows, tokens, strict=True):
            row.sequence.token_ids.append(token)
            yield int(row.sequence.request_id)

    def clear(self) -> None:
        self._sequences.clear()
        self._used_blocks = 0


def load(setup: Setup) -> tuple[Kvferry, dict[str, Any]]:
    return Kvferry(setup), {"torch": torch.__version__, "chunk": setup.chunk}


if __name__ == "__main__":
    serve(load)
