"""A real Prometheus with the configuration of ``deploy/``, whose time runs faster.

Every duration of the configuration and of the rules is divided by ``FASTER``, so that what takes
ten minutes fires within a test; the expressions are what operators load.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.stack import START, eventually, free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus"
FASTER = 30
LEAST = 1000  # ms: no scrape and no window's step is shorter

_UNITS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
# [5m], [1d:1m], offset 10m, for: 10m, scrape_interval: 5s
_DURATION = re.compile(r"(?<=[\[: ])(\d+)([smhd])(?=[\]:)\s]|$)")


def faster(text: str) -> str:
    """The durations in a configuration or a file of rules, ``FASTER`` times as short."""

    def shorter(found: re.Match[str]) -> str:
        return f"{max(LEAST, int(found[1]) * _UNITS[found[2]] // FASTER)}ms"

    return _DURATION.sub(shorter, text)


class Prometheus:
    """``with Prometheus(directory, router) as prometheus``: it scrapes the router at that
    ``host:port``, and every worker that the router names."""

    def __init__(self, directory: Path, router: str) -> None:
        config = (CONFIG / "prometheus.yml").read_text().replace("127.0.0.1:8000", router)
        (directory / "prometheus.yml").write_text(faster(config))
        (directory / "rules.yml").write_text(faster((CONFIG / "rules.yml").read_text()))
        self._directory = directory
        self._port = free_port()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=10)

    def __enter__(self) -> Self:
        executable = shutil.which("prometheus")
        assert executable is not None
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    executable,
                    f"--config.file={self._directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stderr=log,
            )
        assert eventually(self._ready, START), (self._directory / "log").read_text()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    def _ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, each with ``labels`` and ``health``."""
        targets: list[dict[str, Any]] = self._ask("targets")["activeTargets"]
        return targets

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with ``name``, ``health`` and for alerts their ``state``."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {rule["name"] for rule in self.rules() if rule.get("state") == "firing"}

    def query(self, expression: str) -> list[float]:
        """The values of an expression now, those that are no number left out."""
        found = self._ask("query", query=expression)["result"]
        values = [float(series["value"][1]) for series in found]
        return [value for value in values if value == value]

    def _ask(self, path: str, **query: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]
