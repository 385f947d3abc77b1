"""The table of a run, for a terminal and for ``docs/reliability.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from tests.chaos.figures import HEADINGS, Row
from tests.chaos.scenarios import Scenario

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN = "<!-- python -m tests.chaos --write -->\n"
END = "<!-- end -->\n"


def table(rows: Mapping[Scenario, Row]) -> Table:
    """For a terminal."""
    shown = Table("scenario", *HEADINGS)
    for scenario, row in rows.items():
        shown.add_row(scenario.name, *row.cells())
    return shown


def write(rows: Mapping[Scenario, Row]) -> None:
    """Put the table between the page's marks."""
    lines = [("scenario", *HEADINGS), ("---",) * (1 + len(HEADINGS))]
    lines += [(f"`{scenario.name}`", *row.cells()) for scenario, row in rows.items()]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
