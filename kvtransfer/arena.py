"""A worker's KV memory as bytes, and the staging slots beside it. Owns no policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.block_copy import gather_blocks, scatter_blocks
from kernels.digest import digest_blocks
from kvtransfer.transport import Buffer


class Arena:
    """``rows [num_blocks, row_elements]`` of any type, contiguous, on the CPU or a CUDA device.

    A row's bytes must be a multiple of 8. Raises ValueError otherwise.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        if rows.dim() != 2 or not rows.is_contiguous():
            raise ValueError(f"rows must be contiguous [blocks, elements], got {list(rows.shape)}")
        self.rows = rows  # [num_blocks, row_elements]
        self.num_blocks = rows.shape[0]
        self.row_bytes = rows.shape[1] * rows.element_size()
        if self.row_bytes == 0 or self.row_bytes % 8:
            raise ValueError(f"a row must be a multiple of 8 bytes, got {self.row_bytes}")
        self.bytes = _as_bytes(rows)  # [num_blocks, row_bytes]

    def run(self, blocks: Sequence[int]) -> Buffer:
        """The memory of blocks that lie side by side."""
        return self.bytes[blocks[0] : blocks[0] + len(blocks)].reshape(-1)

    def digests(self, blocks: Sequence[int]) -> list[int]:
        """A 64-bit checksum of each block."""
        return digest_blocks(self.rows, blocks)


class Staging:
    """Slots of ``slot_bytes`` or one row, whichever is more, on the arena's device.

    Their fixed number bounds what may be under way at once; who finds none free must wait.
    """

    def __init__(self, arena: Arena, num_slots: int, slot_bytes: int) -> None:
        self.rows_per_slot = max(slot_bytes // arena.row_bytes, 1)
        self._arena = arena
        self._slots = torch.empty(
            (num_slots, self.rows_per_slot, arena.rows.shape[1]),
            dtype=arena.rows.dtype,
            device=arena.rows.device,
        )
        self._bytes = _as_bytes(self._slots)
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def acquire(self) -> int:
        """Take a free slot; there must be one."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.append(slot)

    def buffer(self, slot: int, count: int) -> Buffer:
        """The memory of the first ``count`` rows of a slot."""
        return self._bytes[slot, :count].reshape(-1)

    def gather(self, slot: int, blocks: Sequence[int]) -> list[int]:
        """Copy blocks of the arena into a slot, done when this returns; their digests."""
        return gather_blocks(self._arena.rows, blocks, self._slots[slot, : len(blocks)])

    def scatter(self, slot: int, blocks: Sequence[int]) -> list[int]:
        """Copy the first rows of a slot into blocks of the arena, as ``gather`` does."""
        return scatter_blocks(self._slots[slot, : len(blocks)], blocks, self._arena.rows)


def _as_bytes(tensor: torch.Tensor) -> Buffer:
    as_bytes = tensor.view(torch.uint8)
    return as_bytes if tensor.is_cuda else as_bytes.numpy()
