"""CPU memory that other processes of this host may map and read, but neither resize nor write.

It lies in a file without a name (memfd), so nothing is left behind however the process ends. Its
seals let a reader trust it: no page goes away under a mapping, even when its maker is dead.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import torch
from torch import Tensor

F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, from Linux 5.1 on; the fcntl module lacks it
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_files: dict[int, int] = {}  # address of the memory -> its open file


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.zeros`` on the CPU, in a file that ``shared_file`` finds where the system has them.

    Pages take memory when they are first touched. Raises RuntimeError, as torch does, when the
    machine has not that much memory.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes == 0 or not hasattr(os, "memfd_create"):
        return torch.zeros(shape, dtype=dtype)
    # A file's size is not held against the memory there is, as an allocation's is.
    if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise RuntimeError(f"{num_bytes} bytes are more than this machine's memory")
    file = os.memfd_create("kvferry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, num_bytes)
        memory = mmap.mmap(file, num_bytes)
        # After the only mapping that may write has been made.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(file)
        raise RuntimeError(f"cannot share {num_bytes} bytes: {error}") from error
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    _files[tensor.data_ptr()] = file
    weakref.finalize(memory, _forget, tensor.data_ptr())  # the tensor keeps the mapping alive
    return tensor


def shared_file(tensor: Tensor) -> int | None:
    """The file descriptor under a tensor that begins where one of ``shared_zeros`` does, or None.

    It stays open as long as the tensor's memory.
    """
    return None if tensor.is_cuda else _files.get(tensor.data_ptr())


def map_shared(file: int, num_bytes: int) -> mmap.mmap:
    """Map another process's memory for reading. The file may be closed afterwards.

    Raises ValueError unless it is sealed and has exactly this size: any other file could be cut
    short, and reading past its end would kill this process.
    """
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("memory that cannot be sealed") from error
    if seals & SEALS != SEALS:
        raise ValueError("memory that may still change its size")
    size = os.fstat(file).st_size
    if num_bytes <= 0 or size != num_bytes:
        raise ValueError(f"memory of {size} bytes, announced as {num_bytes}")
    return mmap.mmap(file, num_bytes, prot=mmap.PROT_READ)


def _forget(address: int) -> None:
    os.close(_files.pop(address))
