"""All layers of a decode step in one native call, on weights that ``kernels.linear`` has packed.

A step calls nine functions a layer. Calling each of them from Python, with a tensor for its result
and the interpreter's lock to take again, costs some 10 us: 3 ms in a model of 28 layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention_metadata import AttentionMetadata
from kernels.cpu.library import DTYPES, pointer
from kernels.linear import QuantizedWeight, Weight


class DecoderLayer(Protocol):
    """A layer's weights, as in ``engine.weights.LayerWeights``."""

    attention_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight


# The structures of decoder_layers.cpp.


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", _Matrix),
        ("output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("num_layers", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("contexts", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("layer_stride", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
    )


class DecoderLayers:
    """Computes with ``layers``, whose tensors must stay where they are.

    Every layer is one that ``is_packed``. ``windows`` are the layers' own, 0 for none; ``scale``
    is that of ``kernels.decode_attention``.
    """

    def __init__(
        self,
        native: ctypes.CDLL,
        layers: Sequence[DecoderLayer],
        windows: Sequence[int],
        *,
        eps: float,
        scale: float,
    ) -> None:
        self._compute = native.decoder_layers
        self._layers = (_Layer * len(layers))(*map(_layer, layers, windows))
        dtype = DTYPES[layers[0].mlp_norm.dtype]
        self._model = _Model(self._layers, len(layers), dtype, eps, scale)

    def __call__(
        self,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        kv: Tensor,
        meta: AttentionMetadata,
    ) -> Tensor:
        """What the last layer adds to the residual, [rows, hidden]; changes ``residual``.

        ``residual`` begins as the embeddings, [rows, hidden], contiguous; ``kv`` is the arena,
        [blocks, kv heads, layers, 2, block_size, head_dim], and ``meta`` tells of a new token for
        each row. The rest is as in ``kernels.rotate_and_write``.
        """
        branch = torch.empty_like(residual)
        step = _Step(
            rows=len(residual),
            residual=residual.data_ptr(),
            branch=branch.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=slots.data_ptr(),
            tables=meta.block_tables.data_ptr(),
            table_width=meta.block_tables.shape[1],
            contexts=meta.context_lens.data_ptr(),
            kv=kv.data_ptr(),
            block_stride=kv.stride(0),
            head_stride=kv.stride(1),
            layer_stride=kv.stride(2),
            value_offset=kv.stride(3),
            kv_heads=kv.shape[1],
            block_size=kv.shape[4],
            head_dim=kv.shape[5],
        )
        self._compute(ctypes.byref(self._model), ctypes.byref(step))
        return branch


def is_packed(layer: DecoderLayer) -> bool:
    """Whether all of the layer's matrices lie in panels."""
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return not any(isinstance(matrix, Tensor) for matrix in matrices)


def _layer(layer: DecoderLayer, window: int) -> _Layer:
    return _Layer(
        attention_norm=pointer(layer.attention_norm),
        q_norm=pointer(layer.q_norm),
        k_norm=pointer(layer.k_norm),
        mlp_norm=pointer(layer.mlp_norm),
        qkv=_matrix(layer.qkv, layer.qkv_bias),
        output=_matrix(layer.output),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
        window=window,
    )


def _matrix(weight: Weight, bias: Tensor | None = None) -> _Matrix:
    assert not isinstance(weight, Tensor), "a weight that is not packed"
    _, words, _, word = weight.panels.shape
    matrix = _Matrix(
        panels=pointer(weight.panels),
        bias=pointer(bias),
        inputs=words * word,
        outputs=weight.outputs,
    )
    if isinstance(weight, QuantizedWeight):
        matrix.scales, matrix.totals = pointer(weight.scales), pointer(weight.totals)
    return matrix
