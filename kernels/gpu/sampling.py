"""Sampling: a program reads one row of logits, which stays in the cache, a few dozen times.

A filter's threshold is found by bisection on the values themselves: of float32 values in order
there are 2^32, so 16 rounds of two bits find the exact one. The temperature does not change the
order, so thresholds are among the logits as they come.
"""

# ruff: noqa: N803 (what a kernel is compiled for is in capitals)
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.gpu.gumbel import gumbel_noise, noise_key
from kernels.gpu.language import LOG2_E, Pointer, Scalar, Tile, kernel
from kernels.sampling import SamplingMetadata

TILE = 4096  # logits read at a time
NUM_WARPS = 16
ROUNDS = tl.constexpr(16)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the least normal float32
LOG2_OF_E = tl.constexpr(LOG2_E)


@kernel()
def in_order(bits: Tile) -> Tile:
    """A float32's bits as an int32 that compares as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@kernel()
def lowest_kept(
    logits: Pointer,  # [N]
    floor: Scalar,  # logits below weigh nothing
    scale: Scalar,
    maximum: Scalar,  # of the logits
    target: Scalar,  # above 0
    N: tl.constexpr,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
) -> Scalar:
    """The largest value for which the logits that reach it weigh ``target`` or more together.

    Each weighs 1, or 2^((logit - maximum) * scale) when BY_MASS.
    """
    lanes = tl.arange(0, TILE)
    key = tl.full((), -(2**31), tl.int32)
    unit = tl.full((), 2**30, tl.int32)
    for _ in range(ROUNDS):
        one, two, three = key + unit, key + unit + unit, key + unit + unit + unit
        reach_one = tl.zeros([TILE], tl.float32)
        reach_two = tl.zeros([TILE], tl.float32)
        reach_three = tl.zeros([TILE], tl.float32)
        for start in range(0, N, TILE):
            columns = start + lanes
            x = tl.load(logits + columns, mask=columns < N, other=-float("inf"))
            keys = in_order(x.to(tl.int32, bitcast=True))
            if BY_MASS:
                weights = tl.where(x >= floor, tl.exp2((x - maximum) * scale), 0.0)
            else:
                weights = tl.full([TILE], 1.0, tl.float32)
            reach_one += tl.where(keys >= one, weights, 0.0)
            reach_two += tl.where(keys >= two, weights, 0.0)
            reach_three += tl.where(keys >= three, weights, 0.0)
        if tl.sum(reach_three, axis=0) >= target:
            key = three
        elif tl.sum(reach_two, axis=0) >= target:
            key = two
        elif tl.sum(reach_one, axis=0) >= target:
            key = one
        unit = unit >> 2
    return in_order(key).to(tl.float32, bitcast=True)


@kernel()
def threshold(
    logits: Pointer,  # [N]
    temperature: Scalar,
    top_p: Scalar,
    min_p: Scalar,
    top_k: Scalar,
    N: tl.constexpr,
    TILE: tl.constexpr,
) -> Scalar:
    """The lowest logit that all filters keep."""
    lanes = tl.arange(0, TILE)
    scale = LOG2_OF_E / temperature
    largest = tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, N, TILE):
        x = tl.load(logits + start + lanes, mask=start + lanes < N, other=-float("inf"))
        largest = tl.maximum(largest, x)
    maximum = tl.max(largest, axis=0)
    lowest = -float("inf")
    if top_k < N:
        target = top_k.to(tl.float32)
        lowest = lowest_kept(logits, lowest, scale, maximum, target, N, TILE, BY_MASS=False)
    if top_p < 1:
        masses = tl.zeros([TILE], tl.float32)
        for start in range(0, N, TILE):
            x = tl.load(logits + start + lanes, mask=start + lanes < N, other=-float("inf"))
            masses += tl.where(x >= lowest, tl.exp2((x - maximum) * scale), 0.0)
        target = tl.maximum(top_p, SMALLEST) * tl.sum(masses, axis=0)
        lowest = lowest_kept(logits, lowest, scale, maximum, target, N, TILE, BY_MASS=True)
    if min_p > 0:
        lowest = tl.maximum(lowest, maximum + temperature * tl.log(min_p))
    return lowest


@kernel()
def sample_kernel(
    logits: Pointer,  # float32 [rows, N]
    temperature: Pointer,  # float32 [rows]
    top_p: Pointer,  # float32 [rows]
    min_p: Pointer,  # float32 [rows]
    top_k: Pointer,  # int64 [rows]
    seeds: Pointer,  # int64 [rows]
    positions: Pointer,  # int64 [rows]
    tokens: Pointer,  # int64 [rows]
    N: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * N
    lanes = tl.arange(0, TILE)
    warmth = tl.load(temperature + row)
    key = noise_key(tl.load(seeds + row), tl.load(positions + row))
    lowest = -float("inf")
    if warmth > 0:
        lowest = threshold(
            logits,
            warmth,
            tl.load(top_p + row),
            tl.load(min_p + row),
            tl.load(top_k + row),
            N,
            TILE,
        )
    best = tl.full([TILE], -float("inf"), tl.float32)
    where = tl.zeros([TILE], tl.int32)
    for start in range(0, N, TILE):
        columns = start + lanes
        x = tl.load(logits + columns, mask=columns < N, other=-float("inf"))
        if warmth > 0:
            kept = x >= lowest
            if tl.max(kept.to(tl.int32), axis=0) > 0:  # most tiles have none: noise is dear
                x = tl.where(kept, tl.div_rn(x, warmth) + gumbel_noise(key, columns), -float("inf"))
            else:
                x = tl.full([TILE], -float("inf"), tl.float32)
        where = tl.where(x > best, columns, where)
        best = tl.maximum(best, x)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), where, N), axis=0)
    tl.store(tokens + row, winner.to(tl.int64))


def sample_tokens_triton(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """``kernels.sampling.sample_tokens`` on a GPU."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        sample_kernel[(rows,)](
            logits,
            meta.temperature,
            meta.top_p,
            meta.min_p,
            meta.top_k,
            meta.seeds,
            meta.positions,
            tokens,
            N=vocab_size,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
    return tokens
