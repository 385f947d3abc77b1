"""How another thread ends a transport's sleep."""

from __future__ import annotations

import contextlib
import socket


class WakeUp:
    """A descriptor to poll, which any thread can make readable."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """See ``ring``."""
        return self._reader.fileno()

    def ring(self) -> None:
        """Make the descriptor readable, from any thread, even after ``close``."""
        with contextlib.suppress(OSError):  # full: it is readable; closed: nobody sleeps
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Make it unreadable until the next ``ring``."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Give the descriptors back."""
        self._reader.close()
        self._writer.close()
