"""A worker's KV memory as bytes, and the staging slots beside it. Owns no policy.

Blocks travel as they lie in memory, or in 8 bits (``kernels.wire_quantization``): then every one is
packed. A digest is of the bytes that travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.block_copy import gather_blocks, scatter_blocks
from kernels.digest import digest_blocks
from kernels.wire_quantization import Format, PackedLayout, dequantize_blocks, quantize_blocks
from kvtransfer.transport import Buffer
from kvtransfer.wire import is_run
from protocol.errors import ConfigError
from protocol.geometry import Fingerprint


def packed_layout(fingerprint: Fingerprint) -> PackedLayout | None:
    """How workers with this fingerprint quantise a block for the wire; None: not at all.

    "fp8" is of keys: values always travel in int8. Raises ConfigError for blocks of odd shapes.
    """
    kind, geometry = fingerprint.wire_quantization, fingerprint.geometry
    if kind == "none":
        return None
    tiles = geometry.num_kv_heads * geometry.num_layers * 2
    keys: Format = "e4m3" if kind == "fp8" else "int8"
    try:
        return PackedLayout(tiles, geometry.block_size, geometry.head_dim, keys)
    except ValueError as error:
        raise ConfigError(f"wire quantization {kind}: {error}") from error


class Arena:
    """``rows [num_blocks, row_elements]`` of any type, contiguous, on the CPU or a CUDA device.

    A row's bytes must be a multiple of 8. With a ``layout``, rows are float32, float16 or bfloat16
    of its shape, and travel quantised. Raises ValueError otherwise.
    """

    def __init__(self, rows: torch.Tensor, layout: PackedLayout | None = None) -> None:
        if rows.dim() != 2 or not rows.is_contiguous():
            raise ValueError(f"rows must be contiguous [blocks, elements], got {list(rows.shape)}")
        self.rows = rows  # [num_blocks, row_elements]
        self.num_blocks = rows.shape[0]
        self.row_bytes = rows.shape[1] * rows.element_size()
        if self.row_bytes == 0 or self.row_bytes % 8:
            raise ValueError(f"a row must be a multiple of 8 bytes, got {self.row_bytes}")
        self.bytes = _as_bytes(rows)  # [num_blocks, row_bytes]
        self.layout = layout
        if layout is not None and rows.shape[1] != layout.num_elements:
            raise ValueError(f"rows of {rows.shape[1]} elements do not fit {layout}")

    @property
    def wire_bytes(self) -> int:
        """Of a row in a message, unless the peer copies it from where it lies."""
        return self.row_bytes if self.layout is None else self.layout.row_bytes

    def is_straight(self, blocks: Sequence[int]) -> bool:
        """Whether a message of these blocks can leave from, or land in, their own memory."""
        return self.layout is None and is_run(blocks)

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
        self.rows_per_slot = max(slot_bytes // arena.wire_bytes, 1)
        self._arena = arena
        self._slots = torch.empty(
            (num_slots, self.rows_per_slot, arena.wire_bytes),
            dtype=torch.uint8,
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
        """Pack blocks of the arena into a slot, done when this returns; their digests."""
        arena, packed = self._arena, self._slots[slot, : len(blocks)]
        if arena.layout is None:
            return gather_blocks(arena.rows, blocks, packed.view(arena.rows.dtype))
        return quantize_blocks(arena.rows, blocks, arena.layout, packed)

    def scatter(self, slot: int, blocks: Sequence[int]) -> list[int]:
        """Unpack the first rows of a slot into blocks of the arena, as ``gather`` packs them."""
        arena, packed = self._arena, self._slots[slot, : len(blocks)]
        if arena.layout is None:
            return scatter_blocks(packed.view(arena.rows.dtype), blocks, arena.rows)
        return dequantize_blocks(packed, blocks, arena.layout, arena.rows)


def _as_bytes(tensor: torch.Tensor) -> Buffer:
    as_bytes = tensor.view(torch.uint8)
    return as_bytes if tensor.is_cuda else as_bytes.numpy()
