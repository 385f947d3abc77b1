"""What the dashboard and the alert rules ask for is what the processes tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from deploy.grafana.dashboard import FILE, dashboard
from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack

DEPLOY = FILE.parent.parent
NAME = re.compile(r"\bkvferry_[a-z_]+\b")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    with Stack(model) as running:
        yield running


def told(url: str) -> set[str]:
    """Names of a process's series, those of histograms included."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", httpx.get(url).text, re.M):
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + suffix for suffix in suffixes}
    return names


def test_every_series_that_is_asked_for_exists(stack: Stack) -> None:
    targets = stack.client.get("/admin/targets").json()
    assert {target["labels"]["role"] for target in targets} == {"prefill", "decode"}
    assert {target["labels"]["worker"] for target in targets} == {"prefill-0", "decode-0"}
    names = told(f"{stack.url}/metrics")
    for target in targets:
        [address] = target["targets"]
        names |= told(f"http://{address}/metrics")
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    asked = set(NAME.findall(rules)) | set(NAME.findall(FILE.read_text()))
    assert asked
    assert asked <= names, asked - names


def test_the_dashboard_is_what_its_script_writes() -> None:
    assert json.loads(FILE.read_text()) == dashboard()
