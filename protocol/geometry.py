"""The shape of a KV block and the fingerprint that two workers compare before sharing KV.

A block is one contiguous row of ``kv[num_blocks, num_kv_heads, num_layers, 2, block_size,
head_dim]``: all layers of ``block_size`` tokens, heads first, K then V.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

PROTOCOL_VERSION = 5

KVDtype = Literal["float32", "bfloat16", "float16"]
WireQuantization = Literal["none", "int8", "fp8"]
DTYPE_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4  # of a quantised head_dim of keys or of values


class KVGeometry(BaseModel):
    """Shape and element type of one KV block."""

    model_config = ConfigDict(frozen=True)

    num_kv_heads: int
    num_layers: int
    block_size: int  # tokens
    head_dim: int
    dtype: KVDtype

    @property
    def row_shape(self) -> tuple[int, int, int, int, int]:
        """(num_kv_heads, num_layers, 2, block_size, head_dim)."""
        return (self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of one block."""
        return self._num_vectors * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def quantized_row_bytes(self) -> int:
        """Bytes of one block in 8 bits, the layout of ``kernels.wire_quantization``."""
        return self._num_vectors * (self.head_dim + SCALE_BYTES)

    @property
    def _num_vectors(self) -> int:
        """Keys and values of a block, each of ``head_dim`` elements."""
        return self.num_kv_heads * self.num_layers * 2 * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)


class Fingerprint(BaseModel):
    """All that must agree before KV computed by one worker may be read by another."""

    model_config = ConfigDict(frozen=True)

    protocol_version: int = PROTOCOL_VERSION
    weights_digest: str  # hex, over the weights' bytes (or their seed, for dummy weights)
    rope: str  # canonical text of the rotary embedding's parameters
    geometry: KVGeometry
    wire_quantization: WireQuantization = "none"  # of KV in messages

    @property
    def wire_bytes(self) -> int:
        """Bytes of one block in a message."""
        quantized = self.wire_quantization != "none"
        return self.geometry.quantized_row_bytes if quantized else self.geometry.row_bytes

    @cached_property
    def block_salt(self) -> bytes:
        """Separates the block hashes of models that must not share KV; 64 bytes."""
        return hashlib.blake2b(self.model_dump_json().encode()).digest()

    def difference(self, other: Fingerprint) -> str | None:
        """Name the first field that differs and both values, or None when equal."""
        mine, theirs = _flatten(self), _flatten(other)
        for field, value in mine.items():
            if theirs[field] != value:
                return f"{field}: {value!r} here, {theirs[field]!r} there"
        return None


def _flatten(fingerprint: Fingerprint) -> dict[str, object]:
    fields = fingerprint.model_dump()
    geometry = fields.pop("geometry")
    return {**fields, **{f"geometry.{name}": value for name, value in geometry.items()}}
