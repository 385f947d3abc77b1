"""What the benchmark found, as a table and as JSON. Knows no GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from bench.gpu.case import Ceiling

UNITS: dict[Ceiling, tuple[float, str]] = {"copy": (1e9, "GB/s"), "matmul": (1e12, "TFLOP/s")}


@dataclass(slots=True)
class Row:
    """One case. ``peers`` are their times over ours; what failed has its error's text instead."""

    name: str
    ceiling: Ceiling
    goal: float | None
    seconds: float | None = None
    rate: float | None = None  # bytes/s or FLOP/s
    fraction: float | None = None  # of the ceiling
    error: str | None = None
    peers: dict[str, float | str] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """Grows as the run goes; ``write`` may be called at any time."""

    device: str
    versions: dict[str, str]
    ceilings: dict[Ceiling, float] = field(default_factory=dict)
    checks: dict[str, float | str] = field(default_factory=dict)  # relative error, or what failed
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def table(self) -> Table:
        table = Table(
            title=f"{self.device}: "
            + ", ".join(f"{name} {_rate(name, rate)}" for name, rate in self.ceilings.items())
        )
        table.add_column("case")
        for column in ("ms", "rate", "of ceiling", "goal", "peers' time / ours"):
            table.add_column(column, justify="right")
        for row in self.rows:
            if row.seconds is None or row.rate is None or row.fraction is None:
                table.add_row(row.name, "", "", "", "", row.error)
                continue
            missed = row.goal is not None and row.fraction < row.goal
            peers = [
                f"{name} {ratio if isinstance(ratio, str) else format(ratio, '.2f')}"
                for name, ratio in row.peers.items()
            ]
            table.add_row(
                row.name,
                f"{row.seconds * 1e3:.3f}",
                _rate(row.ceiling, row.rate),
                f"[red]{row.fraction:.2f}[/]" if missed else f"{row.fraction:.2f}",
                "" if row.goal is None else f"{row.goal:.2f}",
                "\n".join(peers),
            )
        return table


def _rate(ceiling: Ceiling, rate: float) -> str:
    scale, unit = UNITS[ceiling]
    return f"{rate / scale:.0f} {unit}"
