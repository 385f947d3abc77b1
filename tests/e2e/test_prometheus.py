"""``deploy/`` in a real Prometheus: what it scrapes, what the dashboard shows, what alarms.

Needs ``prometheus`` and ``promtool`` on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from deploy.grafana.dashboard import ROWS, WINDOW
from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.e2e.prometheus import CONFIG, Prometheus, faster
from tests.stack import Stack, eventually

pytestmark = [
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="no prometheus is on the PATH",
    ),
    pytest.mark.slow,
]
PATIENCE = 120.0  # seconds
# A healthy system has none of these: a worker was lost, or KV did not verify.
NEVER_HAPPENED = re.compile(
    r"kvferry_(request_retries|requests_shed|kv_integrity_failures|kv_transfer_refused_messages)"
    r"_total"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


def complete(stack: Stack, number: int = 0, tokens: int = 8) -> httpx.Response:
    prompt = [10 + number % 50] * 40
    body = {"model": "test", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return stack.client.post("/v1/completions", json=body)


@contextmanager
def in_the_background(work: Callable[[int], object], every: float) -> Iterator[None]:
    """Calls ``work(0)``, ``work(1)``, … each in a thread of its own, until the block is left.

    Requests that are under way then end with the router.
    """
    over = threading.Event()

    def call(number: int) -> None:
        with suppress(httpx.HTTPError, RuntimeError):
            work(number)

    def call_all() -> None:
        number = 0
        while not over.wait(every):
            threading.Thread(target=call, args=(number,), daemon=True).start()
            number += 1

    caller = threading.Thread(target=call_all)
    caller.start()
    try:
        yield
    finally:
        over.set()
        caller.join()


def test_durations_are_shortened_and_nothing_else() -> None:
    text = 'expr: rate(x_5m{le="1.0"}[5m]) offset 10m and y[1d:1m] > 14.4\nfor: 10m # over 1 s'
    assert faster(text) == (
        'expr: rate(x_5m{le="1.0"}[10000ms]) offset 20000ms and y[2880000ms:2000ms] > 14.4\n'
        "for: 20000ms # over 1 s"
    )


@pytest.mark.parametrize(
    "command", [["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]]
)
def test_promtool_accepts_the_files(command: list[str]) -> None:
    checked = subprocess.run(
        ["promtool", *command], cwd=CONFIG, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_healthy_system_is_scraped_shown_and_gives_no_alarm(model: Path, tmp_path: Path) -> None:
    with Stack(model) as stack, Prometheus(tmp_path, f"127.0.0.1:{stack.port}") as prometheus:
        roles = {"router", "prefill", "decode"}
        assert eventually(lambda: up(prometheus) == roles, PATIENCE), prometheus.targets()
        stack.client.post("/v1/completions", json={"model": "test"})  # an error, to be shown
        with in_the_background(lambda number: complete(stack, number), 0.2):
            queries = {
                query: query.replace(WINDOW, "8s")
                for row in ROWS.values()
                for panel in row
                for query in panel.series.values()
                if not NEVER_HAPPENED.search(query)
            }
            empty = set(queries)

            def all_shown() -> bool:
                empty.difference_update(q for q in set(empty) if prometheus.query(queries[q]))
                return not empty

            assert eventually(all_shown, PATIENCE), empty
            assert eventually(lambda: recorded(prometheus), PATIENCE)
        rules = prometheus.rules()
        assert {rule["health"] for rule in rules} == {"ok"}, rules
        assert prometheus.firing() == set()


def up(prometheus: Prometheus) -> set[str]:
    """Roles whose processes are scraped."""
    return {t["labels"]["role"] for t in prometheus.targets() if t["health"] == "up"}


def recorded(prometheus: Prometheus) -> bool:
    """Every recording rule has a value."""
    names = [rule["name"] for rule in prometheus.rules() if rule["type"] == "recording"]
    return all(prometheus.query(name) for name in names)


def test_alarms_when_nothing_disaggregates_and_the_queue_grows(model: Path, tmp_path: Path) -> None:
    router = ("--disaggregation", "never", "--max-queue-time", "600")
    one_at_a_time = ("--max-num-seqs", "1")
    wanted = {"NothingDisaggregates", "QueueGrows"}
    with (
        Stack(model, decode=[one_at_a_time], router=router) as stack,
        Prometheus(tmp_path, f"127.0.0.1:{stack.port}") as prometheus,
        in_the_background(lambda number: complete(stack, number, tokens=500), 0.2),
    ):
        assert eventually(lambda: wanted <= prometheus.firing(), PATIENCE), prometheus.rules()
        assert "PoolIsEmpty" not in prometheus.firing()
        stack.processes["prefill-0"].terminate()
        assert eventually(lambda: "PoolIsEmpty" in prometheus.firing(), PATIENCE)
