"""Play scenarios for many seeds, print their figures, and say which promises did not hold.

    python -m tests.chaos [--seeds 20] [--scenario NAME]... [--write]

Ends with status 1 if a promise was broken. ``--write`` puts the table into docs/reliability.md.
"""

from __future__ import annotations

import itertools
import signal
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from tests.chaos import report
from tests.chaos.figures import Figures, Row
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.scene import CannotPlayError, Scene
from tests.chaos.settings import Setting
from tests.checkpoints import CHECKPOINTS, write_checkpoint

console = Console()


def main(
    seeds: Annotated[int, typer.Option(help="Plays of each scenario.", min=1)] = 20,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given repeatedly.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Into docs/reliability.md.")] = False,
) -> None:
    """Break a deployment on purpose, in every way it promises to withstand."""
    unknown = set(scenario or ()) - {s.name for s in SCENARIOS}
    if unknown:
        names = ", ".join(s.name for s in SCENARIOS)
        raise typer.BadParameter(f"no scenario {', '.join(sorted(unknown))}; there are {names}")
    chosen = [s for s in SCENARIOS if not scenario or s.name in scenario]
    rows = {s: Row() for s in chosen}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        model = write_checkpoint(CHECKPOINTS["llama"], Path(folder) / "llama")
        task = progress.add_task("chaos", total=seeds * len(chosen))
        for setting, group in itertools.groupby(chosen, key=lambda s: s.setting):
            with Stage(setting, model) as stage:
                for each in group:
                    for seed in range(first_seed, first_seed + seeds):
                        progress.update(task, description=f"{each.name} {seed}")
                        play(stage, each, seed, rows[each])
                        progress.advance(task)
                    console.print(f"{each.name}: {rows[each].cells()[-1]}", highlight=False)
    console.print(report.table(rows))
    if write:
        report.write(rows)
    raise typer.Exit(any(figures.broken for row in rows.values() for figures in row.plays))


class Stage:
    """A setting's scene, opened when it is first needed and anew after a failure."""

    def __init__(self, setting: Setting, model: Path) -> None:
        self._setting = setting
        self._model = model
        self._open = ExitStack()
        self._scene: Scene | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scene(self) -> Scene:
        """The running scene. Raises CannotPlayError."""
        if self._scene is None:
            self._scene = self._open.enter_context(self._setting(self._model))
        return self._scene

    def logs(self) -> str:
        """The last lines that each process of an open scene printed."""
        if self._scene is None:
            return ""
        stack = self._scene.stack
        return "\n".join(
            f"--- {name}\n" + "\n".join(stack.log(name).splitlines()[-12:])
            for name in stack.processes
        )

    def close(self) -> None:
        """End the scene, whatever state it is in."""
        self._scene = None
        try:
            self._open.close()
        except AssertionError as error:  # a process that did not end well
            console.print(f"[red]at the end: {error}")


def play(stage: Stage, scenario: Scenario, seed: int, row: Row) -> None:
    """Play once and add the figures to the row. A failed check is a broken promise too."""
    try:
        figures = scenario.play(stage.scene(), seed)
    except CannotPlayError as error:
        row.skipped = str(error)
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the next seeds shall be played
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {where.name}"
        console.print(f"[red]{scenario.name}, seed {seed}: {kind}: {error}", highlight=False)
        figures = Figures(broken=[kind])
    row.plays.append(figures)
    if figures.broken:
        broken = ", ".join(figures.broken)
        console.print(f"[red]{scenario.name}, seed {seed}: {broken}", highlight=False)
        console.print("\n".join(figures.evidence), markup=False, highlight=False)
        console.print(stage.logs(), markup=False, highlight=False)
        stage.close()


if __name__ == "__main__":
    typer.run(main)
