"""The deployment files agree with the program. No engine runs them here: structure only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cli.main import app

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
COMMANDS = {name: s["command"] for name, s in COMPOSE["services"].items() if s["command"]}


@pytest.mark.parametrize("service", COMMANDS)
def test_commands_are_ones_that_kvferry_takes(service: str) -> None:
    name, *arguments = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in COMMANDS[service]]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, arguments)
    assert context.params["cluster_key_file"] == Path("/run/kvferry/cluster.key")
    assert context.params["model"] == "demo"


def test_two_workers_in_each_pool_and_one_of_each_on_gpus() -> None:
    roles = [w for command in COMMANDS.values() for w in command if w.startswith("--role=")]
    assert sorted(roles) == ["--role=decode"] * 3 + ["--role=prefill"] * 3
    gpus = [name for name, s in COMPOSE["services"].items() if s.get("profiles") == ["gpu"]]
    assert gpus == ["prefill-gpu", "decode-gpu"]


def test_every_service_that_serves_has_a_health_check() -> None:
    assert all("healthcheck" in COMPOSE["services"][service] for service in COMMANDS)


def test_the_image_holds_every_package_and_does_not_run_as_root() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    packages = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert packages is not None
    for package in re.findall(r'"(\w+)"', packages[1]):
        assert f"COPY {package} {package}\n" in dockerfile
    assert re.search(r"^USER kvferry$", dockerfile, re.M)
