"""The static path of decode steps, which on a CPU is computed by calling the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, BatchRow
from engine.config import ModelConfig
from engine.decode_graphs import DecodeGraphs, bucket_sizes
from engine.model import Model
from engine.model_runner import ModelRunner
from engine.sequence import Sequence
from engine.step_inputs import step_input
from engine.weights import load_weights, pack_weights
from protocol.sampling import SamplingParams

BLOCK_SIZE = 16
NUM_BLOCKS = 64
CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=40, temperature=0.0)


@pytest.fixture(params=["qwen3", "mistral"])
def model(checkpoint: Callable[[str], Path], request: pytest.FixtureRequest) -> Model:
    folder = checkpoint(request.param)
    config = ModelConfig.load(folder)
    weights, _ = pack_weights(*load_weights(folder, config, torch.float32, CPU), None)
    return Model(config, weights, max_model_len=256)


def new_arena(model: Model) -> Tensor:
    """With a block more for the padding, and NaN wherever nothing was written."""
    config = model.config
    shape = (config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
    return torch.full((NUM_BLOCKS + 1, *shape), torch.nan)


def sequences(*lengths: int) -> list[Sequence]:
    """Of random tokens, in scattered blocks with room for 40 more tokens each."""
    rng = random.Random(sum(lengths))
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    made = []
    for index, length in enumerate(lengths):
        count = -(-(length + 40) // BLOCK_SIZE)
        table, free = free[:count], free[count:]
        tokens = [rng.randrange(256) for _ in range(length)]
        made.append(Sequence(str(index), tokens, length, GREEDY, table))
    return made


def decode_batch(running: list[Sequence]) -> Batch:
    return Batch(tuple(BatchRow(s, s.num_tokens - 1, 1) for s in running))


def prefilled(model: Model, running: list[Sequence]) -> Tensor:
    """An arena that holds the KV of all but each sequence's last token."""
    arena = new_arena(model)
    batch = Batch(tuple(BatchRow(s, 0, s.num_tokens - 1) for s in running))
    ModelRunner(model, arena).run(batch)
    return arena


@torch.inference_mode()
def logits_of(graphs: DecodeGraphs, batch: Batch) -> Tensor:
    return graphs.compute(graphs.fill(batch))[: len(batch.rows)].clone()


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
    ],
)
def test_bucket_sizes(max_rows: int, sizes: list[int]) -> None:
    assert bucket_sizes(max_rows) == sizes


def test_a_batch_takes_the_next_size(model: Model) -> None:
    graphs = DecodeGraphs(model, new_arena(model), max_rows=20)
    for rows, size in ((1, 1), (3, 4), (4, 4), (9, 16), (17, 20), (20, 20)):
        step = graphs.fill(decode_batch(sequences(*[2] * rows)))
        assert len(step.token_ids) == len(step.sampled) == step.num_decode == size


def test_padding_changes_no_bit(model: Model) -> None:
    running = sequences(3, 50, 17, 33)
    arena = prefilled(model, running)
    padded_arena = arena.clone()
    full = logits_of(DecodeGraphs(model, arena, max_rows=4), decode_batch(running))
    graphs = DecodeGraphs(model, padded_arena, max_rows=4)
    padded = logits_of(graphs, decode_batch(running[:3]))
    assert torch.equal(padded, full[:3])
    assert not padded.isnan().any()

    # All that padding writes lies in the block that nobody owns.
    slot = divmod(running[3].num_tokens - 1, BLOCK_SIZE)
    arena[running[3].block_table[slot[0]], :, :, :, slot[1]] = torch.nan
    assert torch.equal(arena[:-1].isnan(), padded_arena[:-1].isnan())
    assert torch.equal(arena[:-1].nan_to_num(), padded_arena[:-1].nan_to_num())
    assert not padded_arena[-1, :, :, :, 0].isnan().any()
    assert padded_arena[-1, :, :, :, 1:].isnan().all()


def test_a_full_bucket_equals_the_eager_step(model: Model) -> None:
    running = sequences(40, 1, 16, 80)
    arena = prefilled(model, running)
    batch = decode_batch(running)
    with torch.inference_mode():
        eager = model.forward(step_input(batch, BLOCK_SIZE, CPU), arena)
    assert torch.equal(logits_of(DecodeGraphs(model, arena, max_rows=4), batch), eager)


def test_buffers_stay_where_they_are(model: Model) -> None:
    running = sequences(30, 5, 20)
    graphs = DecodeGraphs(model, prefilled(model, running), max_rows=4)

    def addresses() -> set[int]:
        step = graphs.fill(decode_batch(running))
        assert step.decode is not None
        tensors = [step.token_ids, step.positions, step.slots, step.sampled]
        tensors += [step.decode.block_tables, step.decode.context_lens, graphs.compute(step)]
        return {tensor.data_ptr() for tensor in tensors}

    with torch.inference_mode():
        first = addresses()
        for _ in range(20):
            for sequence in running:
                sequence.token_ids.append(7)
            assert addresses() == first


def test_what_graphs_do_not_compute(model: Model) -> None:
    graphs = DecodeGraphs(model, new_arena(model), max_rows=2)
    first, second, third = sequences(9, 9, 9)
    assert graphs.fits(decode_batch([first, second]))
    assert not graphs.fits(decode_batch([first, second, third]))
    assert not graphs.fits(Batch((BatchRow(first, 0, 9),)))
    assert not graphs.fits(Batch((BatchRow(first, 3, 1),)))  # inside its prompt: samples nothing


def test_a_runner_with_graphs_generates_the_same_tokens(model: Model) -> None:
    outputs = []
    for graph_rows in (0, 4):
        running = sequences(20, 7, 33, 2, 12)
        arena = prefilled(model, running)
        runner = ModelRunner(model, arena, graph_rows)
        for step in range(30):
            batch = decode_batch(running[: 1 + step % 5])  # five rows do not fit
            for row, token_id in zip(batch.rows, runner.run(batch).token_ids, strict=True):
                row.sequence.token_ids.append(token_id)
        outputs.append([sequence.token_ids for sequence in running])
    assert outputs[0] == outputs[1]


def test_every_size_computes_padding_alone(model: Model) -> None:
    """What a capture runs: no sequence has come yet."""
    graphs = DecodeGraphs(model, new_arena(model), max_rows=9)
    with torch.inference_mode():
        for size in bucket_sizes(9):
            batch = decode_batch(sequences(*[2] * size))
            shape = graphs.compute(graphs.fill(batch)).shape
            assert shape == (size, model.config.vocab_size)
        assert graphs.compute(graphs.fill(Batch(()))).isfinite().all()
