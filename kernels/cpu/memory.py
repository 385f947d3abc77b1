"""Pages: large ones, since what streams through gigabytes spends a quarter of its time on small
ones; and having them before they are needed.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes; smaller tensors cannot hold one
MADV_POPULATE_WRITE = 23  # linux/mman.h, from Linux 5.14 on; the mmap module lacks it


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, its memory on huge pages where the system grants them; best before first use.

    Asks for nothing on other systems than Linux, or when it lies on a GPU.
    """
    if tensor.is_cuda or tensor.nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, end, mmap.MADV_HUGEPAGE)
    return tensor


def private_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.zeros`` on the CPU and on huge pages, which take memory when they are first touched.

    Raises RuntimeError, as torch does, when the machine has not that much memory.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"cannot allocate {num_bytes} bytes: {error}") from error
    return on_huge_pages(torch.frombuffer(memory, dtype=dtype).view(shape))


def populate(tensor: Tensor) -> None:
    """Let the system provide all of the tensor's memory now, not page by page at first use.

    What it holds stays, also while other threads write to it. Does nothing where the system cannot.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, tensor.data_ptr() + tensor.nbytes, MADV_POPULATE_WRITE)


def _advise(start: int, end: int, advice: int) -> None:
    """Tell the system what to do with the pages in [start, end). A refusal costs speed only."""
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))
