"""Requests that schemathesis derives from our own description: none may find a bug."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
)

from router.api_keys import ApiKeys
from router.chat_template import ChatTemplate
from router.openapi import description
from router.text import TextModel
from router.tool_formats import FORMATS
from tests.router.conftest import PATIENCE, Router, routers

KEY = {"Authorization": "Bearer key"}
OPERATIONS = [
    (path, method) for path, methods in description("")["paths"].items() for method in methods
]
VALID = {  # what is drawn depends on the modules that are loaded, and is seldom valid here
    "/v1/completions": {"model": "test", "prompt": "hello"},
    "/v1/chat/completions": {"model": "test", "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "test", "input": "hello"},
    "/tokenize": {"model": "test", "prompt": "hello"},
}
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
PROFILE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def fuzzed(text: TextModel) -> Iterator[Router]:
    template = ChatTemplate("{{ messages | tojson }}{{ tools | tojson }}", {})
    model = replace(text, chat_template=template, tool_format=FORMATS["hermes"], thinks=True)
    with routers(model) as start:
        router = start(api_keys=ApiKeys(["key"]), admin_keys=ApiKeys(["key"]))
        router.say("A short answer.")
        yield router
        assert router.generator.num_open == 0


@pytest.fixture(scope="module")
def api(fuzzed: Router) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_any_request_gets_a_well_formed_answer(
    api: schemathesis.schemas.BaseSchema, path: str, method: str
) -> None:
    operation = api[path][method]
    statuses: set[int] = set()

    @settings(PROFILE, max_examples=200 if method == "post" else 10)
    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES]))
    def fuzz(case: schemathesis.Case) -> None:
        checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
        if path == "/ready":  # 503 is what it is for
            checks = checks[1:]
        answer = case.call_and_validate(headers=KEY, timeout=PATIENCE, checks=checks)
        statuses.add(answer.status_code)

    fuzz()
    if path in VALID:
        case = operation.Case(body=VALID[path], media_type="application/json")
        assert case.call_and_validate(headers=KEY, timeout=PATIENCE).status_code == 200
        statuses.add(200)
    made_up = "{" in path  # the name of a worker
    assert statuses >= ({404} if made_up else {200, 400} if method == "post" else {200})


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_what_is_described_as_guarded_needs_a_key(
    api: schemathesis.schemas.BaseSchema, path: str, method: str
) -> None:
    @settings(PROFILE, max_examples=2)
    @given(api[path][method].as_strategy())
    def fuzz(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=KEY, timeout=PATIENCE, checks=[ignored_auth])

    fuzz()
