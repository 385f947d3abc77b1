"""Log lines: one JSON object each, joined by the answer's id."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from protocol.logs import JsonFormatter, LogFormat, about, format_logs


def line(message: str, *values: object, **kinds: Any) -> dict[str, Any]:
    extra: dict[str, Any] = kinds.pop("extra", {})
    record = logging.LogRecord(
        "router.pools", logging.INFO, __file__, 1, message, values, kinds.get("exc_info")
    )
    vars(record).update(extra)
    text = JsonFormatter(role="decode", worker_id="d0").format(record)
    assert "\n" not in text
    told: dict[str, Any] = json.loads(text)
    return told


def test_a_line_says_when_who_and_what() -> None:
    told = line("%s to %s", "decode-0", "prefill\n")
    assert told.pop("ts").endswith("+00:00")
    assert told == {
        "level": "info",
        "logger": "router.pools",
        "role": "decode",
        "worker_id": "d0",
        "message": "decode-0 to prefill\n",
    }


@pytest.mark.parametrize("name", ["cmpl-1f-0", "cmpl-1f-12#3"])
def test_lines_about_a_sequence_or_an_attempt_carry_the_answers_id(name: str) -> None:
    told = line("x", extra=about(name, code="late"))
    assert (told["request_id"], told["code"]) == ("cmpl-1f", "late")


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        told = line("a bug", exc_info=sys.exc_info())
    assert told["exception"].startswith("Traceback")
    assert told["exception"].endswith("ValueError: two\nlines")


def test_a_process_writes_in_the_format_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    log = logging.getLogger("router.pools")
    formats: tuple[LogFormat, ...] = ("text", "json")
    for log_format in formats:
        format_logs(log_format, role="router")
        log.error("no %s", "room", extra=about("cmpl-1f-0"))
    text, told = capsys.readouterr().err.splitlines()
    assert text.endswith(" ERROR router.pools: no room")
    assert json.loads(told)["request_id"] == "cmpl-1f"
