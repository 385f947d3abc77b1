"""``kvferry pools``: what it says when it cannot do what it is asked."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.stack import free_port


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        (f"http://127.0.0.1:{free_port()}", 1, "Connection refused"),
        ("file:///etc/passwd", 2, "no http address"),
    ],
    ids=["nobody", "no HTTP"],
)
@pytest.mark.parametrize(
    "command", [["drain", "p"], ["flip", "p", "decode"], ["set", "--prefill", "1", "--decode", "2"]]
)
def test_it_says_what_is_wrong_with_the_url(
    command: list[str], url: str, status: int, words: str
) -> None:
    answer = CliRunner().invoke(app, ["pools", *command, "--url", url])
    assert answer.exit_code == status
    assert words in answer.output


@pytest.mark.parametrize(
    "command", [["flip", "p", "router"], ["flip", "p"], ["set", "--prefill", "1"]]
)
def test_what_is_asked_must_be_whole(command: list[str]) -> None:
    assert CliRunner().invoke(app, ["pools", *command]).exit_code == 2
