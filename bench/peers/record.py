"""Figures of one comparison: a JSON file that grows cell by cell, and tables of them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

Figures = dict[str, float]  # of one case: metric -> value


class Record:
    """``cells[peer][case]``, kept on disk after every change, so that a run can be resumed."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self._data: dict[str, Any] = {"about": {}, "cells": {}}
        if resume and path.exists():
            self._data = json.loads(path.read_text())
        self._data["machine"] = {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
        }

    def num_rounds(self, peer: str, case: str) -> int:
        """How often the case was measured; a failure does not count, it is tried again."""
        return len(self._data["cells"].get(peer, {}).get(case, {}).get("rounds", ()))

    def describe(self, peer: str, about: dict[str, Any]) -> None:
        """Keep a peer's versions and settings, and how busy the machine was when it began."""
        self._data["about"][peer] = {**about, "load_average": os.getloadavg()[0]}
        self._save()

    def put(self, peer: str, case: str, figures: Figures, runs: Any) -> None:
        """Keep a round's figures of a case and what they were computed from.

        The case's figures are the medians of its rounds'.
        """
        former = self._cell(peer).get(case, {}).get("rounds", [])
        rounds = [*former, {"figures": figures, "runs": runs}]
        medians = {name: median(r["figures"][name] for r in rounds) for name in figures}
        self._cell(peer)[case] = {"figures": medians, "rounds": rounds}
        self._save()

    def fail(self, peer: str, case: str, reason: str) -> None:
        """Keep why a case has no figures, unless an earlier round gave it some."""
        self._cell(peer).setdefault(case, {"failed": reason})
        self._save()

    def failures(self) -> dict[str, str]:
        """Peer to reason, the first of each."""
        found: dict[str, str] = {}
        for peer, cells in self._data["cells"].items():
            for cell in cells.values():
                if "failed" in cell:
                    found.setdefault(peer, cell["failed"])
        return found

    def table(self, metric: str, title: str, baseline: str) -> Table:
        """Peers by cases that have the metric; behind each figure its ratio to the baseline's."""
        cells: dict[str, dict[str, Any]] = self._data["cells"]
        cases = list(
            dict.fromkeys(
                case
                for row in cells.values()
                for case, cell in row.items()
                if metric in cell.get("figures", {})
            )
        )
        table = Table("", *cases, title=title)
        for peer, row in cells.items():
            if row.keys().isdisjoint(cases):
                continue
            table.add_row(peer, *(self._text(metric, peer, case, baseline) for case in cases))
        return table

    def _text(self, metric: str, peer: str, case: str, baseline: str) -> str:
        cell, base = (self._data["cells"].get(name, {}).get(case, {}) for name in (peer, baseline))
        if metric not in cell.get("figures", {}):
            return "failed" if "failed" in cell else ""
        value = cell["figures"][metric]
        if metric not in base.get("figures", {}):
            return f"{value:,.4g}"
        return f"{value:,.4g} ({value / base['figures'][metric]:.2f}×)"

    def _cell(self, peer: str) -> dict[str, Any]:
        cells: dict[str, Any] = self._data["cells"].setdefault(peer, {})
        return cells

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self._data, indent=1) + "\n")
        fresh.replace(self._path)  # a run that is cut off leaves a whole file


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
