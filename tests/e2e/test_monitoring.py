"""What the dashboard and the alert rules ask for is what the processes tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from deploy.grafana.dashboard import FILE, dashboard
from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.collector import Collector
from tests.stack import Stack, eventually

DEPLOY = FILE.parent.parent
NAME = re.compile(r"\bkvferry_[a-z_]+\b")


JSON = ("--log-format", "json")
EXPORTED = 30.0  # seconds, generous: spans travel in batches every five


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    with Stack(model, router=(*JSON, "--otlp-endpoint", collector.url), worker=JSON) as running:
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


def test_a_request_is_found_in_logs_and_traces(stack: Stack, collector: Collector) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    body = {"model": "test", "prompt": [5] * 40, "max_tokens": 3, "ignore_eos": True}
    answer = stack.client.post("/v1/completions", json=body, headers=headers).raise_for_status()
    answer_id = answer.json()["id"]

    lines = {name: list(map(json.loads, stack.log(name).splitlines())) for name in stack.processes}
    assert {line["role"] for line in lines["router"]} == {"router"}
    assert {line["worker_id"] for line in lines["decode-0"]} == {"decode-0"}
    [line] = [line for line in lines["router"] if line.get("request_id") == answer_id]
    assert (line["outcome"], line["output_tokens"], line["path"]) == ("length", 3, "remote")
    timeline = stack.client.get(f"/admin/requests/{answer_id}").json()["sequences"][0]
    assert sum(line["stages_ms"].values()) == pytest.approx(timeline["seconds"] * 1e3, abs=0.1)

    names = {stage["name"] for stage in timeline["stages"]}
    assert eventually(lambda: len(collector.spans) > len(timeline["stages"]), EXPORTED)
    spans = [span for span in collector.spans if span.trace_id.hex() == trace]
    [root] = [span for span in spans if span.parent_span_id.hex() == parent]
    assert root.name == "text_completion test"
    assert {span.name for span in spans if span.parent_span_id == root.span_id} == names
