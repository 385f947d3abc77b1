"""A benchmark's figures, kept in a JSON file of named parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def record(path: Path, part: str, figures: Mapping[str, object] | list[dict[str, object]]) -> None:
    """Replace one part of the file; the others stay."""
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = figures
    path.write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")
