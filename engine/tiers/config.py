"""What tiers a worker has, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.tiers.disk import DiskTier
from engine.tiers.host import HostTier
from engine.tiers.tier import Tier
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Bounds of the tiers below a worker's KV pool."""

    host_bytes: int = 0  # of host memory, for a GPU's KV; 0: none
    disk_dir: Path | None = None  # this worker's own; None: no disk
    disk_bytes: int = 10 << 30


def open_tiers(config: TierConfig, rows: Tensor, salt: bytes) -> list[Tier]:
    """The tiers, fastest first; each holds what the one before it gives up.

    ``rows`` is the KV arena, [num_blocks, row elements]; ``salt`` names whose KV it is. Raises
    ConfigError.
    """
    if config.host_bytes and not rows.is_cuda:
        raise ConfigError(
            "--kv-host-size is for GPU workers: a CPU's KV lies in host memory already, "
            "--kv-cache-memory gives it more"
        )
    row_bytes = rows.shape[1] * rows.element_size()
    tiers: list[Tier] = []
    if config.disk_dir is not None:
        tiers.append(DiskTier(config.disk_dir, config.disk_bytes, row_bytes, salt))
    if config.host_bytes:
        tiers.insert(0, HostTier(config.host_bytes, row_bytes, tiers[0] if tiers else None))
    return tiers
