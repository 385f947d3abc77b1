"""What a run leaves: every request as its client saw it, in one JSON file. Times in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from planner.outcome import Slo
from protocol.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One request. ``scheduled``, ``sent`` and ``ended`` count from the run's start.

    ``times`` holds the arrival of each event with text, counted from ``sent``; an event may carry
    several tokens, ``output_tokens`` says how many all have.
    """

    index: int
    scheduled: float
    sent: float
    ended: float
    prompt_tokens: int  # as the endpoint counts them, or as asked for
    expected_tokens: int  # of output, asked for
    output_tokens: int
    times: tuple[float, ...]
    error: str | None = None  # its kind
    message: str = ""  # what the endpoint or the network said of it


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """How busy the load generator was while it measured."""

    wall: float
    cpu: float  # seconds of processor time
    stall_p99: float  # seconds by which its event loop was late
    stall_max: float


@dataclass(frozen=True, slots=True)
class Run:
    """One load and all it gave. ``rate`` is the offered one, None in a closed loop."""

    rate: float | None
    results: tuple[Result, ...]
    client: ClientLoad


@dataclass(frozen=True, slots=True)
class Record:
    """A file: one run, or the runs of a sweep in the order of measuring."""

    endpoint: str
    model: str
    started: str  # ISO 8601
    settings: Mapping[str, str | int | float | bool | None]
    slo: Slo
    runs: tuple[Run, ...]
    knee: float | None = None  # a sweep's result, requests a second
    format: int = FORMAT

    @property
    def chosen(self) -> Run:
        """The run to show: the one at the knee, or else the last."""
        return next((run for run in self.runs if run.rate == self.knee), self.runs[-1])

    def save(self, path: Path, figures: Mapping[str, Any]) -> None:
        """Write the file; ``figures`` of the chosen run come first, for whoever only reads them."""
        whole = {"figures": figures, **_ADAPTER.dump_python(self, mode="json")}
        path.write_text(json.dumps(whole) + "\n")


_ADAPTER = TypeAdapter(Record)


def load(path: Path) -> Record:
    """Raises ConfigError when the file is not such a record."""
    try:
        record = _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is no record of kvferry bench: {where} {first['msg']}"
        ) from error
    if record.format != FORMAT or not record.runs:
        raise ConfigError(f"{path} has format {record.format} and {len(record.runs)} runs")
    return record
