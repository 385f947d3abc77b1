"""Workers join, leave and die under a running router; the router itself may come back."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack, eventually

ASK = {"model": "test", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = next(iter(CHECKPOINTS))
    return write_checkpoint(CHECKPOINTS[name], tmp_path_factory.mktemp("model") / name)


def ask(stack: Stack, **options: object) -> httpx.Response:
    return httpx.post(f"{stack.url}/v1/completions", json={**ASK, **options}, timeout=60)


def ready(stack: Stack) -> int:
    return httpx.get(f"{stack.url}/ready", timeout=30).status_code


def test_workers_join_and_leave(model: Path) -> None:
    with Stack(model, prefill=[], decode=[], router=("--disaggregation", "always")) as stack:
        assert ready(stack) == 503
        refused = ask(stack)
        assert refused.status_code == 503
        assert "no prefill worker" in refused.json()["error"]["message"]
        stack.start_worker("prefill", "p")
        stack.start_worker("decode", "d")
        stack.wait_for_workers(2)
        assert ready(stack) == 200
        assert ask(stack).status_code == 200
        rows = {row["id"]: row for row in stack.workers()}
        assert rows["p"]["role"] == "prefill"
        assert rows["d"]["pid"] == stack.processes["d"].pid

        stack.processes["d"].send_signal(signal.SIGTERM)
        assert stack.processes.pop("d").wait(timeout=30) == 0
        assert eventually(lambda: ready(stack) == 503, 10)
        stack.start_worker("decode", "d")
        assert eventually(lambda: ready(stack) == 200, 60)
        assert ask(stack).status_code == 200
        stack.assert_idle()


def test_a_killed_worker_ends_its_requests_and_its_successor_serves(model: Path) -> None:
    with Stack(model, worker=["--dtype", "float32"]) as stack:
        body = {**ASK, "max_tokens": 1000, "stream": True}
        with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            victim = stack.processes.pop("decode-0")
            victim.kill()
            victim.wait()
            events = [line for line in lines if line]
        assert "error" in events[-1]
        assert "decode-0" in events[-1]
        assert eventually(lambda: ready(stack) == 503, 10)
        stack.start_worker("decode", "decode-0")
        assert eventually(lambda: ready(stack) == 200, 60)
        assert ask(stack).status_code == 200
        stack.assert_idle()


def test_a_restarted_router_finds_its_workers(model: Path) -> None:
    with Stack(model) as stack:
        assert ask(stack).status_code == 200
        victim = stack.processes.pop("router")
        victim.kill()
        victim.wait()
        stack.start_router()
        stack.wait_for_workers(2)
        assert ask(stack).status_code == 200
        stack.assert_idle()


def test_workers_whose_kv_does_not_fit_are_never_paired(model: Path) -> None:
    pools = {"prefill": [["--block-size", "16"]], "decode": [["--block-size", "32"]]}
    with Stack(model, **pools) as stack:
        refused = ask(stack)
        assert refused.status_code == 503
        message = refused.json()["error"]["message"]
        assert "block_size" in message
        assert "16" in message
        assert "32" in message


def test_what_can_never_fit_says_both_numbers(model: Path) -> None:
    limits = ["--max-model-len", "512"]
    with Stack(model, worker=limits, decode=[["--num-kv-blocks", "32"]]) as stack:
        refused = ask(stack, prompt=[1] * 600)
        assert refused.status_code == 400
        assert "600" in refused.json()["error"]["message"]
        assert "512" in refused.json()["error"]["message"]
        assert ask(stack, prompt=[1] * 500).status_code == 200
        stack.assert_idle()
