"""Linear layers, their weights as published or packed for the CPU.

A packed weight [outputs, inputs] lies in panels of 32 outputs, zeros in the place of missing ones.
A panel holds, for each word of inputs (2 of bf16, 4 of int8) in order, that word of every output:

    panels[p, w, o, i] = weight[32 p + o, words * w + i]       [panels, inputs / word, 32, word]

so that reading it front to back gives vectors of outputs to multiply by one word of inputs. Rows
can still be taken out of it, as an embedding needs. It replaces the published layout.

In 8 bits (``quantize``) a weight's row n is scales[n] times integers from -127 to 127, an input row
its own scale times such integers, found as it comes (largest magnitude / 127); products are summed
exactly, then scaled in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import library
from kernels.cpu.linear import linear_bf16_native, linear_int8_native
from kernels.cpu.memory import on_huge_pages

PANEL = 32  # outputs
CHUNK = 1 << 20  # elements converted at a time


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A bf16 weight in panels."""

    panels: Tensor  # bf16 [panels, inputs / 2, 32, 2]
    outputs: int


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """An 8-bit weight in panels."""

    panels: Tensor  # int8 [panels, inputs / 4, 32, 4]
    outputs: int
    scales: Tensor  # float32 [panels * 32]
    totals: Tensor  # int32 [panels * 32]: the sum of each output's integers
    dtype: torch.dtype  # of what was quantised


Weight = Tensor | PackedWeight | QuantizedWeight


def pack(weight: Tensor) -> Tensor | PackedWeight:
    """The weight for the fastest ``linear`` there is for it: in panels, or as it is.

    ``weight`` is [outputs, inputs], contiguous; it is rearranged in its own memory where that has
    the right size, and must not be used again.
    """
    if weight.dtype != torch.bfloat16 or weight.is_cuda or weight.shape[1] % 2:
        return weight
    if library.load_for_products() is None:
        return weight
    return PackedWeight(_panels(weight, 2), len(weight))


def quantize(weight: Tensor) -> QuantizedWeight:
    """The weight [outputs, inputs] in 8 bits, each row with a scale of its own.

    Raises ValueError when the inputs are not a multiple of 4.
    """
    outputs, inputs = weight.shape
    if inputs % 4:
        raise ValueError(f"a layer of {inputs} inputs cannot be quantised: not a multiple of 4")
    padded = -(-outputs // PANEL) * PANEL
    scales = torch.zeros(padded)
    integers = on_huge_pages(torch.empty((padded, inputs), dtype=torch.int8))
    integers[outputs:] = 0
    totals = torch.zeros(padded, dtype=torch.int32)
    step = max(1, CHUNK // inputs)
    for start in range(0, outputs, step):
        rows = weight[start : start + step].float()
        scale, quantised = _quantize_rows(rows)
        scales[start : start + len(rows)] = scale
        integers[start : start + len(rows)] = quantised
        totals[start : start + len(rows)] = quantised.sum(1)
    return QuantizedWeight(_panels(integers, 4), outputs, scales, totals, weight.dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x`` times the transposed weight, plus ``bias``: [rows, outputs] in ``x``'s type.

    ``x`` is [rows, inputs], its last dimension contiguous; ``bias`` is [outputs]. Summed in
    float32 or wider and rounded once. With a packed weight, a row's result does not depend on the
    others.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    native = library.load()
    if native is None:
        return linear_torch(x, weight, bias)
    out = x.new_empty((len(x), weight.outputs))
    if isinstance(weight, PackedWeight):
        linear_bf16_native(native, x, weight.panels, bias, out)
    else:
        linear_int8_native(native, x, weight.panels, weight.scales, weight.totals, bias, out)
    return out


def linear_torch(
    x: Tensor, weight: PackedWeight | QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """``linear`` of a packed weight in torch, which unpacks it first."""
    rows = _rows(weight.panels)[: weight.outputs]
    if isinstance(weight, PackedWeight):
        return F.linear(x, rows, bias)
    scale, integers = _quantize_rows(x.float())
    sums = F.linear(integers.double(), rows.double()).float()  # exact: below 2^53
    out = sums * (weight.scales[: weight.outputs] * scale.unsqueeze(1))
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Row ``ids[i]`` of the weight for every i: [len(ids), inputs], in the weight's first type."""
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight)
    rows = weight.panels[ids // PANEL, :, ids % PANEL].flatten(1)
    if isinstance(weight, PackedWeight):
        return rows
    return (rows * weight.scales[ids].unsqueeze(1)).to(weight.dtype)


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the integers (int8) of each of the float32 rows."""
    largest = rows.abs().amax(1)
    # torch takes 127 / largest for 127 * (1 / largest), which rounds twice.
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)
    return largest / 127, (rows * inverse.unsqueeze(1)).round_().to(torch.int8)


def _panels(weight: Tensor, word: int) -> Tensor:
    """[outputs, inputs] as [panels, inputs / word, 32, word], in place unless it must be padded."""
    outputs, inputs = weight.shape
    missing = -outputs % PANEL
    if missing:
        weight = F.pad(weight, (0, 0, 0, missing))
    count, words = len(weight) // PANEL, inputs // word
    rows = weight.view(torch.int32).view(count, PANEL, words)
    panels = rows.view(count, words, PANEL)
    step = max(1, CHUNK // (PANEL * words))
    for start in range(0, count, step):
        part = slice(start, start + step)
        panels[part] = rows[part].clone().transpose(1, 2)  # both are one memory
    return panels.view(weight.dtype).view(count, words, PANEL, word)


def _rows(panels: Tensor) -> Tensor:
    """The inverse of ``_panels``, as a copy, with the padding."""
    count, words, _, word = panels.shape
    return panels.transpose(1, 2).reshape(count * PANEL, words * word)
