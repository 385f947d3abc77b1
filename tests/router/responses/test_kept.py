"""Responses that are asked for later, and those made in the background."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import openai
import pytest

from protocol.errors import OverloadedError, RequestNotFoundError
from router.api_keys import ApiKeys
from router.responses_store import ResponseStore
from tests.router.conftest import HANG, Router, eventually
from tests.router.responses.conftest import (
    checked,
    client_of,
    events_of,
)


def test_responses_are_kept(client: openai.OpenAI, router: Router) -> None:
    router.say("abc")
    whole = client.responses.create(model="test", input="Hi")
    assert client.responses.retrieve(whole.id).to_dict() == whole.to_dict()
    final = events_of(router, input="Hi")[-1]["response"]
    assert client.responses.retrieve(final["id"]).to_dict() == final
    forgotten = client.responses.create(model="test", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(forgotten.id)
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(client.responses.retrieve(whole.id, stream=True))
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(whole.id)


def test_a_response_is_seen_by_its_own_key_only(start: Callable[..., Router]) -> None:
    router = start(api_keys=ApiKeys(["ours", "theirs"]))
    router.say("abc")
    with client_of(router, "ours") as ours, client_of(router, "theirs") as theirs:
        check_seen_by_one(router, ours, theirs)


def check_seen_by_one(router: Router, ours: openai.OpenAI, theirs: openai.OpenAI) -> None:
    finished = ours.responses.create(model="test", input="Hi")
    router.generator.script = [HANG]
    running = ours.responses.create(model="test", input="Hi", background=True)
    for response in (finished, running):
        assert ours.responses.retrieve(response.id).id == response.id
        with pytest.raises(openai.NotFoundError):
            theirs.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            theirs.responses.cancel(response.id)
    assert router.generator.num_open == 1
    assert ours.responses.cancel(running.id).status == "cancelled"


def test_a_response_in_the_background(client: openai.OpenAI, router: Router) -> None:
    router.say("abc")
    begun = client.responses.create(model="test", input="Hi", background=True)
    checked(begun)
    assert (begun.status, begun.background) == ("in_progress", True)
    assert eventually(lambda: client.responses.retrieve(begun.id).status == "completed")
    over = checked(client.responses.retrieve(begun.id))
    assert over.output_text == "abc"
    assert client.responses.cancel(begun.id).to_dict() == over.to_dict()  # too late
    router.generator.script = [OverloadedError("full")]
    begun = client.responses.create(model="test", input="Hi", background=True)
    assert eventually(lambda: client.responses.retrieve(begun.id).status == "failed")
    error = checked(client.responses.retrieve(begun.id)).error
    assert error is not None
    assert error.code == "rate_limit_exceeded"


def test_a_bug_in_the_background(client: openai.OpenAI, router: Router) -> None:
    router.generator.script = [ZeroDivisionError("secret")]
    begun = client.responses.create(model="test", input="Hi", background=True)
    assert eventually(lambda: client.responses.retrieve(begun.id).status == "failed")
    error = checked(client.responses.retrieve(begun.id)).error
    assert error is not None
    assert error.code == "server_error"
    assert "secret" not in error.message


def test_cancelling(client: openai.OpenAI, router: Router) -> None:
    router.say("Good day.")
    router.generator.script = [*router.generator.script[:2], HANG]
    begun = client.responses.create(model="test", input="Hi", background=True)
    assert eventually(lambda: client.responses.retrieve(begun.id).output_text != "")
    assert router.generator.num_open == 1
    assert checked(client.responses.retrieve(begun.id)).status == "in_progress"
    for _ in range(2):
        cancelled = checked(client.responses.cancel(begun.id))
        assert cancelled.status == "cancelled"
        assert "Good day.".startswith(cancelled.output_text)
        assert cancelled.usage is not None
        assert cancelled.usage.output_tokens > 0
        assert eventually(lambda: router.generator.num_open == 0)


def test_what_is_remembered_is_bounded() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)

    def kept(ids: str) -> str:
        found = []
        for name in ids:
            with suppress(RequestNotFoundError):
                found.append(json.loads(store.find("me", name))["id"])
        return "".join(found)

    for name in "abcde":
        store.keep("me", {"id": name, "background": False})
    assert kept("abcde") == "cde"
    store.keep("me", {"id": "f", "background": False, "output": "x" * 930})
    assert kept("abcdef") == "ef"
    store.keep("me", {"id": "g", "background": False, "output": "x" * 1000})
    assert kept("abcdefg") == ""
