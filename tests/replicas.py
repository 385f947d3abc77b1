"""Several routers in front of the same workers, as separate processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from tests.stack import START, Stack, eventually, free_port


class Replicas(Stack):
    """A ``Stack`` whose workers serve ``num_routers`` routers, the first of them at ``url``.

    ``options`` are a ``Stack``'s.
    """

    def __init__(self, model: Path | str, num_routers: int, **options: Any) -> None:
        super().__init__(model, **options)
        others = range(1, num_routers)
        self._controls = [f"ipc://{self.directory}/router-{number}.sock" for number in others]
        self._ports = [free_port() for _ in others]
        for control in self._controls:
            self._worker_arguments = (*self._worker_arguments, "--router", control)
        self.urls = [self.url, *(f"http://127.0.0.1:{port}" for port in self._ports)]
        self.turns = cycle(self.urls)  # round robin

    def start_router(self) -> None:
        """Start the router processes."""
        super().start_router()
        for number, (control, port) in enumerate(zip(self._controls, self._ports, strict=True), 1):
            arguments = ["router", "--model", self.model, "--control", control]
            arguments += ["--port", str(port), "--served-model-name", "test"]
            self._start(f"router-{number}", [*arguments, *self._router_arguments])

    def wait_for_workers(self, count: int, timeout: float = START) -> None:
        """Until ``count`` workers are serving, and every router knows them."""
        super().wait_for_workers(count, timeout)
        for url in self.urls[1:]:
            assert eventually(lambda url=url: self._num_serving(url) == count, timeout), url

    def _num_serving(self, url: str) -> int:
        try:
            rows: Sequence[dict[str, Any]] = self.client.get(f"{url}/admin/workers").json()[
                "workers"
            ]
        except httpx.TransportError:
            return 0
        return sum(row["state"] == "serving" for row in rows)
