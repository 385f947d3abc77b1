"""Single threads of a process that are made to stand still, as a driver or a device might do.

The kernel's ``ptrace`` stops one thread and leaves the others running. It is the caller's thread
that traces, so a stop begins and ends on one thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.scene import CannotPlayError
from tests.stack import IDLE, eventually

PTRACE_DETACH = 17  # these four: linux/ptrace.h, linux/wait.h
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WALL = 0x40000000  # wait for threads too

CALLS = {  # of Linux on x86-64, known by an argument: number, argument, its value
    "poll for 1000 ms": ("7", 2, 1000),
    "futex until woken": ("202", 1, 0x189),  # FUTEX_WAIT_BITSET | FUTEX_CLOCK_REALTIME, private
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@contextmanager
def stopped(thread: int) -> Iterator[None]:
    """The thread of this id stands still for the block's time. Raises CannotPlayError."""
    _ptrace(PTRACE_SEIZE, thread)
    _ptrace(PTRACE_INTERRUPT, thread)
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        _ptrace(PTRACE_DETACH, thread)


def sleeping(process: int, call: str) -> int:
    """The one thread of an idle process that waits in a system call, see ``CALLS``.

    Raises CannotPlayError when there is not exactly one.
    """
    number, argument, value = CALLS[call]
    found: list[int] = []

    def one() -> bool:
        found.clear()
        for task in Path(f"/proc/{process}/task").iterdir():
            words = (task / "syscall").read_text().split()
            if words[0] == number and int(words[1 + argument], 16) == value:
                found.append(int(task.name))
        return len(found) == 1

    try:
        alone = eventually(one, IDLE)
    except OSError as error:
        raise CannotPlayError(f"threads do not show what they do: {error}") from error
    if not alone:
        raise CannotPlayError(f"{len(found)} threads sleep in {call}")
    return found[0]


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) != 0:
        raise CannotPlayError(f"ptrace says {os.strerror(ctypes.get_errno())}")
