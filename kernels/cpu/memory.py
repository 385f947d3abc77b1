"""Large pages: what streams through gigabytes spends a quarter of its time on small ones."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes; smaller tensors cannot hold one


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, its memory on huge pages where the system grants them; best before first use.

    Asks for nothing on other systems than Linux, or when it lies on a GPU.
    """
    if tensor.is_cuda or tensor.nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    # A refusal costs speed only.
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return tensor
