"""No field of OpenAI's requests is ignored that would change the answer.

Each of the ``openai`` package's request types has an effect, is refused by name, or is documented
to have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from router.schemas import UNSUPPORTED, ChatBody, CompletionBody
from router.text import TextModel
from tests.router.conftest import Router, routers

DOCS = Path(__file__).parents[2] / "docs"
NONSENSE = [[None]]  # no field's value
QUESTION = [{"role": "user", "content": "Hi"}]
REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (
        completion_create_params.CompletionCreateParamsBase,
        {"prompt": "x"},
    ),
    "/v1/chat/completions": (
        chat_create_params.CompletionCreateParamsBase,
        {"messages": QUESTION},
    ),
    "/v1/responses": (response_create_params.ResponseCreateParamsBase, {"input": "x"}),
}
FIELDS = [(path, name) for path, (kind, _) in REQUESTS.items() for name in get_type_hints(kind)]
MESSAGE_FIELDS = sorted(
    {name for kind in get_args(chat.ChatCompletionMessageParam) for name in get_type_hints(kind)}
)


def documented(page: str, heading: str = "") -> set[str]:
    """Names in code quotes, in the table with that heading or in all of the page."""
    text = (DOCS / page).read_text()
    if heading:
        text = text[text.index(f"| {heading}") :].split("\n\n")[0]
    return set(re.findall(r"`([a-z_.]+)`", text))


WITHOUT_EFFECT = documented("api.md", "without effect")


@pytest.fixture(scope="module")
def router(text: TextModel) -> Iterator[Router]:
    with routers(text) as start:
        router = start()
        router.say("Yes.")
        yield router


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_no_field_is_silently_ignored(router: Router, path: str, name: str) -> None:
    _, body = REQUESTS[path]
    answer = router.post(path, **{**body, name: NONSENSE})
    if answer.status_code == 200:
        assert name in WITHOUT_EFFECT
    else:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].split(".")[0] == name
    page = "responses.md" if path == "/v1/responses" else "api.md"
    assert name in documented(page) | WITHOUT_EFFECT


@pytest.mark.parametrize("name", MESSAGE_FIELDS)
def test_no_field_of_a_message_is_silently_ignored(router: Router, name: str) -> None:
    messages = [{**QUESTION[0], name: NONSENSE}]
    answer = router.post("/v1/chat/completions", messages=messages)
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]["param"].split(".")
    assert name in documented("api.md")


def test_the_options_of_a_stream_are_those_that_are_documented(router: Router) -> None:
    """That which has no effect may have any value."""
    names = set(get_type_hints(chat.ChatCompletionStreamOptionsParam))
    hidden = {name for name in names if f"stream_options.{name}" in WITHOUT_EFFECT}
    assert names - hidden <= documented("api.md", "supported")
    for name in names:
        answer = router.post(
            "/v1/completions", prompt="x", stream=True, stream_options={name: NONSENSE}
        )
        assert answer.status_code == (200 if name in hidden else 400)


def test_the_page_lists_every_field_under_what_becomes_of_it() -> None:
    supported, refused = documented("api.md", "supported"), documented("api.md", "refused")
    fields = CompletionBody.model_fields.keys() | ChatBody.model_fields.keys()
    assert fields <= supported
    assert refused >= UNSUPPORTED.keys()
    assert not WITHOUT_EFFECT & (fields | UNSUPPORTED.keys())


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, (_, body) in REQUESTS.items()])
def test_a_priority_reaches_the_workers(router: Router, path: str, body: dict[str, Any]) -> None:
    for fields, priority in (({}, 0), ({"priority": -3}, -3)):
        router.generator.requests.clear()
        assert router.post(path, **body, **fields).status_code == 200
        assert [request.priority for request in router.generator.requests] == [priority]
