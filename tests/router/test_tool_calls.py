"""Tool calls out of text, wherever the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from protocol.errors import InvalidRequestError
from protocol.grammar import check, source
from router.tool_calls import Parsed, ToolCallDelta, ToolCallParser, whole_calls
from router.tool_formats import FORMATS, ToolFormat, detect
from router.tools import Tool, call_grammar
from tests.router.conftest import MODEL

Call = tuple[str, str]

HERMES, LLAMA, MISTRAL = (FORMATS[name] for name in ("hermes", "llama3_json", "mistral"))
F = '{"name": "f", "arguments": {"a": [1, "}\\"<"], "b": {}}}'
F_ARGUMENTS = '{"a": [1, "}\\"<"], "b": {}}'
G = '{"parameters": {}, "name": "gé\\n", "type": "function"}'
BROKEN = '{"name": "f", "arguments": {"a": 1}'
NOT_CALLS = [
    BROKEN,
    '{"name": 5, "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "f", "arguments": "x"}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": 1]}',
    '{"name": "f", "arguments": {"a": ?}}',
    '{"name": "f", "arguments": {"a": \'x\'}}',
    '{"name": "\\ud800", "arguments": {}}',
    '{"name": "\\x", "arguments": {}}',
    "[1]",
    "x",
]


def parse(form: ToolFormat, pieces: Sequence[str], *, only_one: bool = False) -> Parsed:
    parser = ToolCallParser(form, only_one=only_one)
    parts = [*(parser.feed(piece) for piece in pieces), parser.end()]
    deltas = [call for part in parts for call in part.calls]
    calls = whole_calls(deltas)
    assert len(calls) == parser.num_calls
    for call in calls:  # one opening delta each, and it is the first
        own = [delta for delta in deltas if delta.index == call.index]
        assert [delta.name for delta in own] == [call.name, *([None] * (len(own) - 1))]
        assert isinstance(json.loads(call.arguments), dict)
    return Parsed("".join(part.content for part in parts), calls)


def outcome(form: ToolFormat, text: str, *, only_one: bool = False) -> tuple[str, list[Call]]:
    parsed = parse(form, [text], only_one=only_one)
    assert parse(form, [*text], only_one=only_one) == parsed
    return parsed.content, [(call.name or "", call.arguments) for call in parsed.calls]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, f"Hi\n\n<tool_call>\n{F}\n</tool_call>\n<tool_call>{G}</tool_call>\n"),
        (HERMES, f"Hi<tool_call>{F}<tool_call>{G}"),
        (LLAMA, f"Hi <|python_tag|>{F}; {G}"),
        (MISTRAL, f"Hi[TOOL_CALLS] [{F}, {G}]"),
        (MISTRAL, f"Hi[TOOL_CALLS][{F},{G}"),
    ],
)
def test_calls_after_text(form: ToolFormat, text: str) -> None:
    assert outcome(form, text) == ("Hi", [("f", F_ARGUMENTS), ("gé\n", "{}")])
    assert outcome(form, text, only_one=True) == ("Hi", [("f", F_ARGUMENTS)])


def test_bare_calls_begin_the_output() -> None:
    assert outcome(LLAMA, f"\n{F};{G}") == ("", [("f", F_ARGUMENTS), ("gé\n", "{}")])
    assert outcome(LLAMA, f"Say {F}") == (f"Say {F}", [])
    assert outcome(HERMES, F) == (F, [])


def test_text_after_calls() -> None:
    text = f"<tool_call>{F}</tool_call> and more <tool_call>{G}</tool_call>\n</tool"
    assert outcome(HERMES, text) == (" and more\n</tool", [("f", F_ARGUMENTS), ("gé\n", "{}")])


def test_a_call_without_arguments_has_none() -> None:
    assert outcome(HERMES, '<tool_call>{"name": "f"}</tool_call>') == ("", [("f", "{}")])


@pytest.mark.parametrize("text", ["", " \n", "Hi <tool", "[TOOL_CALLS", "a < b", "<tool_call>"])
@pytest.mark.parametrize("form", FORMATS.values())
def test_text_alone_is_kept_as_it_is(form: ToolFormat, text: str) -> None:
    assert outcome(form, text) == (text, [])


@pytest.mark.parametrize("call", NOT_CALLS)
@pytest.mark.parametrize("form", FORMATS.values())
def test_what_is_no_call_is_content(form: ToolFormat, call: str) -> None:
    text = f"Hi \n{form.opening}{form.array}{call}{form.closing} so"
    assert outcome(form, text) == (text, [])
    if form is HERMES:
        good = f"<tool_call>{F}</tool_call>"
        assert outcome(form, text + good) == (text, [("f", F_ARGUMENTS)])


def test_arguments_are_streamed() -> None:
    parser = ToolCallParser(HERMES)
    pieces = ['Hi <tool_call>\n{"na', 'me": "f", "arg', 'uments": {"a', '": 1', "}", "}\n</to"]
    parts = [parser.feed(piece) for piece in pieces]
    assert [part.content for part in parts] == ["Hi", "", "", "", "", ""]
    assert [part.calls for part in parts] == [
        [],
        [],
        [ToolCallDelta(0, "f", '{"a')],
        [ToolCallDelta(0, None, '": 1')],
        [ToolCallDelta(0, None, "}")],
        [],
    ]


FRAGMENTS = st.sampled_from(
    [
        *(mark for form in FORMATS.values() for mark in (form.opening, form.closing)),
        *NOT_CALLS,
        *[F, G, "[", ", ", ";", "{", "}", '"', "\\", "text", " ", "\n", "<tool", '{"name": "f"'],
    ]
)


@settings(deadline=None, max_examples=300)
@given(
    form=st.sampled_from([*FORMATS.values()]),
    fragments=st.lists(FRAGMENTS, max_size=8),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    only_one=st.booleans(),
)
def test_cuts_do_not_matter(
    form: ToolFormat, fragments: list[str], cuts: list[int], only_one: bool
) -> None:
    text = "".join(fragments)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    whole = parse(form, [text], only_one=only_one)
    assert parse(form, pieces, only_one=only_one) == whole
    assert parse(form, [*text], only_one=only_one) == whole
    if not whole.calls:
        assert whole.content == text


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("return it within <tool_call></tool_call> tags", HERMES),
        ("<tool_call>\n<function=example>", None),
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("[TOOL_CALLS]f[ARGS]{}", None),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', LLAMA),
        ("{{ messages }}", None),
    ],
)
def test_the_chat_template_says_how_tools_are_called(
    template: str, form: ToolFormat | None
) -> None:
    assert detect(template) == form


def tool(name: str, **fields: object) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, **fields}})


SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "$defs": {"number": {"type": "integer"}},
}
TOOLS = [tool("f", parameters=SCHEMA), tool('g"é\n', parameters=SCHEMA), tool("nothing")]


@pytest.mark.parametrize("form", FORMATS.values())
@pytest.mark.parametrize("only_one", [False, True])
def test_required_calls_are_what_the_parser_reads(form: ToolFormat, only_one: bool) -> None:
    tokenizer = LLTokenizer(str(MODEL / "tokenizer.json"))
    grammar = call_grammar(form, TOOLS, None, only_one=only_one)
    check(grammar)

    def matches(text: str) -> bool:
        matcher = LLMatcher(tokenizer, source(grammar), log_level=0)
        return bool(matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting())

    def written(*calls: Call) -> str:
        objects = [
            f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{form.arguments}": {arguments}}}'
            for name, arguments in calls
        ]
        opening = "" if form.bare else form.opening
        pad = form.padding
        if form.separator:
            listed = f"{form.separator} ".join(objects)
            return f"{opening}{form.array}{pad}{listed}{pad}{form.closing}"
        return "\n".join(f"{opening}{pad}{call}{pad}{form.closing}" for call in objects)

    calls = [("f", '{"a": 1}'), ('g"é\n', '{"a": -2}'), ("nothing", "{}")]
    for call in calls:
        assert matches(written(call))
        assert outcome(form, written(call)) == ("", [call])
    assert matches(written(*calls)) == (not only_one)
    assert outcome(form, written(*calls)) == ("", calls)
    if form is MISTRAL:
        assert matches(written(calls[0]).replace("][", "] ["))
    for wrong in [("h", "{}"), ("f", "{}"), ("f", '{"a": "x"}'), ("nothing", '{"a": 1}')]:
        assert not matches(written(wrong))
    assert not matches("Hi")
    assert not matches("")


def test_an_opening_that_is_a_special_token_is_that_token() -> None:
    tokenizer = LLTokenizer(str(MODEL / "tokenizer.json"))
    grammar = call_grammar(replace(MISTRAL, opening="<|user|>"), TOOLS, 3, only_one=True)
    check(grammar)
    matcher = LLMatcher(tokenizer, source(grammar), log_level=0)
    call = '[{"name": "nothing", "arguments": {}}]'
    assert matcher.consume_tokens([3, *tokenizer.tokenize_str(call)])
    assert matcher.is_accepting()


@pytest.mark.parametrize("schema", [{"properties": {"a": {"type": "objet"}}}, {"not": {}}])
def test_parameters_that_cannot_be_enforced_are_refused(schema: dict[str, object]) -> None:
    schema = {**schema, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequestError, match="lark"):
        check(call_grammar(HERMES, [tool("f", parameters=schema)], None, only_one=True))
