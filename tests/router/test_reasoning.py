"""Thoughts apart from content, wherever the text is cut, and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat_template import ChatTemplate
from router.reasoning import ReasoningParser
from router.text import TextModel
from router.tool_formats import FORMATS
from tests.router.conftest import MODEL, Router, routers

CHAT = "/v1/chat/completions"
QUESTION: list[Any] = [{"role": "user", "content": "Why?"}]
TEMPLATE = "{{ messages | tojson }}{% if tools %}{% endif %}{{ '<think>\n' if deep else '' }}"
DEEP: dict[str, Any] = {"chat_template_kwargs": {"deep": True}}
TIME = {"type": "function", "function": {"name": "time"}}


def parse(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(inside=inside)
    parts = [*(parser.feed(piece) for piece in pieces), parser.end()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "inside", "outcome"),
    [
        ("\n<think>\nHm </</think>\n\n Yes </think>", False, ("Hm </", "Yes </think>")),
        ("\nHm.\n\nSo\n</think>\n\nYes\n", True, ("Hm.\n\nSo", "Yes\n")),
        ("<think></think>Yes", False, ("", "Yes")),
        ("<think>Hm </thi", False, ("Hm </thi", "")),
        ("</think>", True, ("", "")),
        (" Yes <think>Hm</think>", False, ("", " Yes <think>Hm</think>")),
        ("<thin", False, ("", "<thin")),
        ("", True, ("", "")),
    ],
)
def test_thoughts_and_content(text: str, inside: bool, outcome: tuple[str, str]) -> None:
    assert parse([text], inside=inside) == outcome
    assert parse([*text], inside=inside) == outcome


@settings(deadline=None, max_examples=300)
@given(
    fragments=st.lists(
        st.sampled_from(["<think>", "</think>", "</", "<th", "Hm", " ", "\n", "k>"]), max_size=9
    ),
    cuts=st.lists(st.integers(0, 60), max_size=9),
    inside=st.booleans(),
)
def test_cuts_do_not_matter(fragments: list[str], cuts: list[int], inside: bool) -> None:
    text = "".join(fragments)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert parse(pieces, inside=inside) == parse([text], inside=inside)


@pytest.fixture(scope="module")
def shared(text: TextModel) -> Iterator[Router]:
    template = ChatTemplate(TEMPLATE, {})
    model = replace(text, chat_template=template, tool_format=FORMATS["hermes"], thinks=True)
    with routers(model) as start:
        yield start()


@pytest.fixture
def router(shared: Router) -> Router:
    shared.generator.requests.clear()
    return shared


@pytest.mark.parametrize(
    ("said", "extra"),
    [("<think>\nHm.\n</think>\n\n", {}), ("Hm.\n</think>\n\n", DEEP)],
)
def test_reasoning_content(router: Router, said: str, extra: dict[str, Any]) -> None:
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    router.say(f"{said}Yes.\n{call}", at_once=3)
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
    ask: dict[str, Any] = {"model": "test", "messages": QUESTION, "tools": [TIME]}
    answer = client.chat.completions.create(**ask, extra_body=extra)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    assert len(message.tool_calls) == 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        len(chunk.token_ids) for chunk in router.generator.script if not isinstance(chunk, str)
    )
    stream = client.chat.completions.create(**ask, extra_body=extra, stream=True)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_completions_show_all(router: Router) -> None:
    router.say("<think>Hm</think>Yes")
    choice = router.post("/v1/completions", prompt="x").json()["choices"][0]
    assert choice["text"] == "<think>Hm</think>Yes"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("tools", {"tools": [TIME], "tool_choice": "required"}),
    ],
)
def test_a_grammar_cannot_begin_with_thoughts(
    router: Router, field: str, body: dict[str, Any]
) -> None:
    router.say("a")
    answer = router.post(CHAT, messages=QUESTION, **body, **DEEP)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert "<think>" in answer.json()["error"]["message"]
    assert router.post(CHAT, messages=QUESTION, **body).status_code == 200


@pytest.mark.parametrize(
    ("template", "parser", "thinks"),
    [
        ("{{ messages }}</think>", "auto", True),
        ("{{ messages }}", "auto", False),
        ("{{ messages }}</think>", "none", False),
        ("{{ messages }}", "think", True),
    ],
)
def test_the_chat_template_says_whether_a_model_thinks(
    tmp_path: Any, template: str, parser: str, thinks: bool
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    assert TextModel.load(tmp_path, reasoning_parser=parser).thinks == thinks


def test_thoughts_of_earlier_messages_reach_the_template(router: Router) -> None:
    router.say("a")
    earlier = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}
    router.post(CHAT, messages=[*QUESTION, earlier, *QUESTION])
    prompt = router.text.decode(router.generator.requests[-1].prompt_token_ids)
    assert '"reasoning_content": "Hm"' in prompt
