"""Log lines of every process: plain text, or one JSON object a line, joined by a request's id.

A line about a request passes ``extra=about(...)``. Clients, the router's admin routes and all
processes' lines then have one id in common: the answer's.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def about(request_id: str, **fields: Any) -> dict[str, Any]:
    """``extra`` of a line about a sequence (``ANSWER-N``) or an attempt at it (``ANSWER-N#M``).

    ``fields`` are told in JSON only.
    """
    answer_id = request_id.partition("#")[0].rpartition("-")[0]
    return {"fields": {"request_id": answer_id, **fields}}


class JsonFormatter(logging.Formatter):
    """One object a line: ``ts`` (UTC), ``level``, ``logger``, the process's fields, ``message``."""

    def __init__(self, **process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def format_logs(log_format: LogFormat, **process: str) -> None:
    """Say how this process writes its lines. ``process`` names it in JSON: role, worker_id."""
    formatter = JsonFormatter(**process) if log_format == "json" else logging.Formatter(TEXT)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
