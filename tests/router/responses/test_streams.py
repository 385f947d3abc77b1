"""The events of a streamed response, seen by the openai package's own types and helper."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from protocol.errors import OverloadedError, WorkerLostError
from tests.router.conftest import PATIENCE, Router
from tests.router.responses.conftest import (
    BROKEN,
    CALL,
    RESPONSES,
    THOUGHTS,
    TIME,
    checked,
    events_of,
)


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    times = ("id", "created_at", "completed_at")
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    return {**{k: v for k, v in response.items() if k not in times}, "output": output}


def test_the_order_of_events(router: Router) -> None:
    router.say(f"{THOUGHTS}Yes.\n{CALL}")
    events = events_of(router, input="Hello", tools=[TIME])
    kinds = [event["type"].removeprefix("response.") for event in events]
    item = ["output_item.added", "content_part.added"]
    end = ["content_part.done", "output_item.done"]
    assert list(dict.fromkeys(kinds[:2])) == ["created", "in_progress"]
    shape = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    assert shape == [
        *["created", "in_progress"],
        *[*item, "reasoning_text.delta", "reasoning_text.done", *end],
        *[*item, "output_text.delta", "output_text.done", *end],
        "output_item.added",
        *["function_call_arguments.delta", "function_call_arguments.done", "output_item.done"],
        "completed",
    ]
    final = events[-1]["response"]
    for index, output in enumerate(final["output"]):  # each event is about its item
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"] == {**own[0]["item"], "id": output["id"], "status": "in_progress"}
        assert {event["item_id"] for event in own[1:-1]} == {output["id"]}
        assert own[-1]["item"] == output
        deltas = "".join(e["delta"] for e in own if e["type"].endswith("delta"))
        assert deltas == output.get("arguments") or deltas == output["content"][0]["text"]
    assert [output["type"] for output in final["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]


@pytest.mark.parametrize(
    "said", ["Yes.", THOUGHTS, f"{THOUGHTS}Yes.", f"{CALL}\n{CALL}", f"So\n{CALL} and {CALL}."]
)
@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("at_once", [1, 4, 500])
def test_a_stream_ends_with_the_whole_response(
    client: openai.OpenAI, router: Router, said: str, reason: str, at_once: int
) -> None:
    router.say(said, reason, at_once=at_once)
    ask: dict[str, Any] = {"input": "Hello", "tools": [TIME]}
    whole = router.post(RESPONSES, **ask)
    response = checked(whole)
    last = events_of(router, **ask)[-1]
    assert last["type"] == f"response.{response.status}"
    assert without_ids(last["response"]) == without_ids(whole.json())
    with client.responses.stream(model="test", **ask) as stream:
        events = list(stream)
    assert events[-1].type == last["type"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output_text
    if reason == "stop":
        assert response.status == "completed"
        assert stream.get_final_response().output_text == response.output_text
    else:
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.to_dict()["output"][-1]["status"] == "incomplete"  # type: ignore[index]


def test_an_output_without_text(router: Router) -> None:
    router.say("")
    assert checked(router.post(RESPONSES, input="Hello")).output == []
    kinds = [event["type"] for event in events_of(router, input="Hello")]
    assert kinds == ["response.created", "response.in_progress", "response.completed"]


def test_what_was_no_call_after_all(router: Router) -> None:
    router.say(f"{BROKEN} {CALL}")
    whole = checked(router.post(RESPONSES, input="Hello", tools=[TIME]))
    assert [item.type for item in whole.output] == ["message", "function_call"]
    assert "UTC}" in whole.output_text
    final = events_of(router, input="Hello", tools=[TIME])[-1]["response"]
    assert [(item["type"], item["status"]) for item in final["output"]] == [
        ("function_call", "incomplete"),
        ("message", "completed"),
        ("function_call", "completed"),
    ]
    assert final["output"][1]["content"][0]["text"] == whole.output_text
    router.say(f"{BROKEN} {CALL}", at_once=500)  # then it was never taken for a call
    final = events_of(router, input="Hello", tools=[TIME])[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["message", "function_call"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(WorkerLostError("gone"), "server_error"), (OverloadedError("full"), "rate_limit_exceeded")],
)
def test_a_stream_that_fails(router: Router, error: Exception, code: str) -> None:
    router.say("abc")
    router.generator.script = [router.generator.script[0], error]
    events = events_of(router, input="Hi")
    failed = events[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": code, "message": str(error)}
    assert [item["status"] for item in failed["response"]["output"]] == ["incomplete"]
    kept = httpx.get(f"{router.url}{RESPONSES}/{failed['response']['id']}", timeout=PATIENCE)
    assert kept.json() == failed["response"]


def test_a_failure_before_any_token_has_its_status(router: Router) -> None:
    router.generator.script = [OverloadedError("full")]
    for stream in (True, False):
        assert router.post(RESPONSES, input="Hi", stream=stream).status_code == 429


def test_a_bug_within_a_stream(router: Router) -> None:
    router.say("abc")
    router.generator.script = [router.generator.script[0], ZeroDivisionError("secret")]
    events = events_of(router, input="Hi")
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(events)
