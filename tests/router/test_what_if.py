"""``/admin/workload`` and ``/admin/what-if``: what is remembered, what is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from protocol.errors import InvalidRequestError, WorkerLostError
from router.api_keys import ApiKeys
from router.generation import TokenChunk
from router.request_log import Record
from router.timeline import Timeline
from router.workload_log import MAX_SEQUENCES, Observed, WorkloadLog
from tests.router.conftest import HANG, PATIENCE, Router, eventually

ASKED = {"prefill": 2, "decode": 1, "ttft": 0.5, "tpot": 0.05, "rate_factor": 2}


def workload(router: Router, query: str = "") -> list[Observed]:
    answer = httpx.get(f"{router.url}/admin/workload{query}", timeout=PATIENCE).json()
    assert answer["columns"] == list(Observed._fields)
    return [Observed(*row) for row in answer["rows"]]


def test_what_came_is_told_with_its_lengths_and_times(router: Router) -> None:
    router.say("Hello there", "length")
    usage = router.post("/v1/completions", model="test", prompt="Say hello").json()["usage"]
    router.generator.script = [WorkerLostError("gone")]
    router.post("/v1/completions", model="test", prompt="a")
    served, failed = workload(router)
    assert (served.prompt_tokens, served.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert served.arrival < failed.arrival <= 600
    assert served.ttft is not None
    assert served.ttft > 0
    assert (failed.output_tokens, failed.ttft, failed.tpot) == (0, None, None)


def test_who_left_before_the_first_token_is_no_workload(router: Router) -> None:
    router.generator.script = [HANG]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            router.url + "/v1/completions", json={"model": "test", "prompt": "a"}, timeout=0.3
        )
    assert eventually(lambda: router.generator.num_open == 0)
    assert workload(router) == []


def test_the_log_forgets_what_is_old_and_the_oldest_of_too_many() -> None:
    log = WorkloadLog()
    for number in range(MAX_SEQUENCES + 10):
        log.add(Record(f"cmpl-{number}-0", number, Timeline(received=float(number))))
    now = float(MAX_SEQUENCES + 10)
    assert len(log.window(now, now)) == MAX_SEQUENCES
    recent = log.window(5.0, now)
    assert [row.arrival for row in recent] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [row.prompt_tokens for row in log.window(5.0, now, limit=2)] == [now - 2, now - 1]


def test_a_question_carries_the_workload_and_the_workers(router: Router) -> None:
    router.generator.prediction = {"rate": 1.5}
    router.generator.script = [TokenChunk([5], "length")]
    router.post("/v1/completions", model="test", prompt="a")
    assert router.post("/admin/what-if", **ASKED).json() == {"rate": 1.5}
    [question] = router.generator.questions
    assert ASKED.items() <= question.asked.model_dump().items()
    assert len(question.workload) == 1
    assert question.workers == router.generator.workers()


def test_the_latency_model_is_asked_for_without_pools(router: Router) -> None:
    router.generator.prediction = {"name": "observed"}
    answer = httpx.get(router.url + "/admin/latency-model", timeout=PATIENCE)
    assert answer.json() == {"name": "observed"}
    [question] = router.generator.questions
    assert question.asked is None
    assert question.workers == router.generator.workers()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prefill": -1}, "prefill"),
        ({"decode": 0}, "decode"),
        ({"decode": 257}, "decode"),
        ({"decode": "2"}, "decode"),
        ({"rate_factor": 0}, "rate_factor"),
        ({"ttft": 0}, "ttft"),
        ({"seconds": 4000}, "seconds"),
    ],
)
def test_bad_questions_are_named(router: Router, wrong: dict[str, Any], param: str) -> None:
    answer = router.post("/admin/what-if", **{**ASKED, **wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert router.generator.questions == []


def test_why_nothing_can_be_predicted_is_told(router: Router) -> None:
    router.generator.prediction = InvalidRequestError("only 3 requests were served")
    answer = router.post("/admin/what-if", **ASKED)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "only 3 requests were served"


def test_predictions_need_a_key(start: Callable[..., Router]) -> None:
    router = start(api_keys=ApiKeys(["secret"]))
    assert router.post("/admin/what-if", **ASKED).status_code == 401
    assert httpx.get(router.url + "/admin/workload").status_code == 401
