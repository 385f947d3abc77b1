"""A router whose model thinks and calls tools, and openai's types to look at its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from router.chat_template import ChatTemplate
from router.text import TextModel
from router.tool_formats import FORMATS
from tests.router.conftest import Router, routers

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TIME: dict[str, Any] = {"type": "function", "name": "time", "parameters": None, "strict": True}
THOUGHTS = "<think>\nHm, so.\n</think>\n\n"
CALL = '<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>'
BROKEN = '<tool_call>{"name": "time", "arguments": {"zone": UTC}}</tool_call>'


@pytest.fixture(scope="module")
def model(text: TextModel) -> TextModel:
    template = ChatTemplate(
        "{{ messages | tojson }}{% if tools %}{{ tools | tojson }}{% endif %}", {}
    )
    return replace(text, chat_template=template, tool_format=FORMATS["hermes"], thinks=True)


@pytest.fixture(scope="module")
def shared(model: TextModel) -> Iterator[Router]:
    with routers(model) as start:
        router = start()
        router.generator.max_model_len = 1000
        yield router


@pytest.fixture
def router(shared: Router) -> Router:
    shared.generator.requests.clear()
    return shared


@pytest.fixture
def client(router: Router) -> Iterator[openai.OpenAI]:
    with client_of(router) as client:
        yield client


def client_of(router: Router, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0)


def prompt_of(router: Router) -> list[dict[str, Any]]:
    """The messages that reached the chat template."""
    prompt = router.text.decode(router.generator.requests[-1].prompt_token_ids)
    messages: list[dict[str, Any]] = json.JSONDecoder().raw_decode(prompt)[0]
    return messages


def events_of(router: Router, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each as openai's types have it."""
    answer = router.post(RESPONSES, stream=True, **body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def checked(answer: BaseModel | httpx.Response) -> Response:
    """The answer, if openai's types have it; its client alone does not look."""
    if isinstance(answer, httpx.Response):
        assert answer.status_code == 200, answer.text
        return Response.model_validate_json(answer.content)
    return Response.model_validate(answer.to_dict())
