"""Decode steps of fixed shapes, captured as CUDA graphs when the engine starts and replayed.

Launching a decode step's kernels one by one takes the host longer than a GPU needs to run them. A
graph launches them all at once, with the shapes and addresses of its capture: a batch is padded to
the next of a few sizes and written into buffers that stay where they are. Padding rows have no
tokens to attend to, and write their keys and values into the arena's last block, which must belong
to nobody.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left

import torch
from torch import Tensor

from engine.batch import Batch
from engine.model import Model, StepInput
from engine.step_inputs import decode_inputs
from kernels.decode_bucket import DecodeBucket

log = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4)  # rows; then every multiple of SIZE_STEP
SIZE_STEP = 8
WARM_UPS = 2  # of a step before its capture: kernels compile, libraries allocate


def bucket_sizes(max_rows: int) -> list[int]:
    """The numbers of rows that batches of up to ``max_rows`` are padded to, ascending."""
    sizes = [*SMALL_SIZES, *range(SIZE_STEP, max_rows, SIZE_STEP)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs:
    """Steps in which up to ``max_rows`` sequences get one token each.

    ``arena`` is [blocks + 1, kv heads, layers, 2, block_size, head_dim]. Until ``capture``, and on
    a CPU, steps are computed in the same buffers by calling the model.
    """

    def __init__(self, model: Model, arena: Tensor, max_rows: int) -> None:
        self._model = model
        self._arena = arena
        self._sizes = bucket_sizes(max_rows)
        self._inputs = {size: _StaticInputs(size, model, arena) for size in self._sizes}
        self._logits = torch.empty((max_rows, model.config.vocab_size), device=arena.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by size

    def fits(self, batch: Batch) -> bool:
        """Whether a graph can compute the batch: every row has one new token and samples."""
        return len(batch.rows) <= self._sizes[-1] and all(
            row.num_tokens == 1 and row.samples for row in batch.rows
        )

    def fill(self, batch: Batch) -> StepInput:
        """Write the batch into the buffers of the next size; the last step must have ended."""
        size = self._sizes[bisect_left(self._sizes, len(batch.rows))]
        return self._inputs[size].fill(batch)

    def compute(self, step: StepInput) -> Tensor:
        """Logits of a filled step, float32 [its size, vocab], valid until the next one."""
        graph = self._graphs.get(step.num_decode)
        if graph is None:
            return self._forward(step)
        graph.replay()
        return self._logits[: step.num_decode]

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size in the current stream, which must not be the default one.

        The graphs share one pool of memory: the largest, captured first, decides its size.
        """
        started, before = time.perf_counter(), torch.cuda.memory_reserved()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        for size in reversed(self._sizes):
            step = self._inputs[size].fill(Batch(()))
            for _ in range(WARM_UPS):
                self._forward(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                self._forward(step)
            self._graphs[size] = graph
        log.info(
            "captured %d decode graphs of up to %d rows in %.1f s, %.0f MiB",
            len(self._graphs),
            self._sizes[-1],
            time.perf_counter() - started,
            (torch.cuda.memory_reserved() - before) / (1 << 20),
        )

    def _forward(self, step: StepInput) -> Tensor:
        """Call the model; the logits go where all graphs leave theirs."""
        return self._logits[: step.num_decode].copy_(self._model.forward(step, self._arena))


class _StaticInputs:
    """The inputs of ``rows`` rows, each at one address; filled through page-locked memory."""

    def __init__(self, rows: int, model: Model, arena: Tensor) -> None:
        block_size, device = arena.shape[4], arena.device
        self._block_size = block_size
        self._scratch_slot = (len(arena) - 1) * block_size
        self._staging = torch.zeros((3, rows), dtype=torch.int64, pin_memory=arena.is_cuda)
        self._host = self._staging.numpy()  # token ids, positions, slots
        self._inputs = self._staging.to(device)  # on a CPU the staging tensor itself
        self._sampled = torch.arange(rows, device=device)
        self._attention = DecodeBucket(
            rows, model.max_model_len, block_size, model.config.windows, device
        )

    def fill(self, batch: Batch) -> StepInput:
        """The batch's rows, then rows of no tokens."""
        rows = batch.rows
        self._host[:, : len(rows)] = decode_inputs(rows, self._block_size)
        self._host[:, len(rows) :] = [[0], [0], [self._scratch_slot]]
        if self._inputs is not self._staging:
            self._inputs.copy_(self._staging, non_blocking=True)
        token_ids, positions, slots = self._inputs
        return StepInput(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            sampled=self._sampled,
            num_decode=len(self._sampled),
            decode=self._attention.fill(
                [row.sequence.blocks() for row in rows], [row.end for row in rows]
            ),
            prefill=None,
        )
