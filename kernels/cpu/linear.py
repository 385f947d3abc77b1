"""Linear layers in C++, on weights that ``kernels.linear`` has packed."""

from __future__ import annotations

import ctypes

from torch import Tensor

from kernels.cpu.library import DTYPES, pointer


def linear_bf16_native(
    library: ctypes.CDLL, x: Tensor, panels: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """``out`` = ``kernels.linear.linear`` of a ``PackedWeight``."""
    library.linear_bf16(
        x.data_ptr(),
        x.stride(0),
        panels.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        *x.shape,
        out.shape[1],
    )


def linear_int8_native(
    library: ctypes.CDLL,
    x: Tensor,
    panels: Tensor,
    scales: Tensor,
    totals: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out`` = ``kernels.linear.linear`` of a ``QuantizedWeight``."""
    library.linear_int8(
        DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        panels.data_ptr(),
        scales.data_ptr(),
        totals.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        *x.shape,
        out.shape[1],
    )
