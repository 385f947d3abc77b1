"""Blocks that are told apart by their numbers."""

from __future__ import annotations

import numpy as np
import torch

from engine.tiers.tier import Row
from kernels.digest import digest_blocks
from protocol.hashing import hash_block


def name(number: int) -> bytes:
    """A block's hash."""
    return hash_block(b"", [number], b"")


def block(number: int, row_bytes: int) -> Row:
    """A block's bytes."""
    return np.random.default_rng(number).integers(0, 256, row_bytes, np.uint8)


def digest_of(row: Row) -> int:
    """The digest that a block is stored with."""
    return digest_blocks(torch.from_numpy(row).view(1, -1), [0])[0]
