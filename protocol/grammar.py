"""Grammars for structured output: what each kind's text holds, and whether it can be served.

    json_schema  a JSON Schema object; the output is JSON that it accepts
    json_object  nothing; the output is any JSON object
    regex        a regular expression of Rust's regex crate; the output matches it as a whole
    choice       a JSON list of strings; the output is one of them
    lark         a grammar of llguidance's dialect of Lark; the output is a sentence of ``start``

Workers compile what ``source`` gives with their checkpoint's tokenizer; the router only checks it.
"""

from __future__ import annotations

import json
from typing import assert_never

from llguidance import LLMatcher, LLParserLimits

from protocol.errors import InvalidRequestError
from protocol.sampling import Grammar

LIMITS = LLParserLimits(verbose_errors=False)  # the defaults, without the grammar in every error
# Room for indentation, but no end in white space: some models never leave it.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises InvalidRequestError when the text is no JSON."""
    match grammar.kind:
        case "json_schema":
            return _of_schema(grammar.text)
        case "json_object":
            return _of_schema('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_lark(_one_of(grammar.text))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case _:
            assert_never(grammar.kind)


def check(grammar: Grammar) -> None:
    """Raise InvalidRequestError, with the reason, unless the grammar is one that is understood.

    A keyword of JSON Schema that cannot be enforced is a reason. Takes up to some 100 ms.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(source(grammar), limits=LIMITS)
    if failed:
        raise InvalidRequestError(f"{grammar.kind}: {' '.join(messages)}")


def _of_schema(text: str) -> str:
    # The schema cannot weaken what the overrides say.
    try:
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"lenient": False, "whitespace_pattern": WHITE_SPACE}
        )
    except ValueError as error:
        raise InvalidRequestError(f"json_schema: {error}") from error


def _one_of(text: str) -> str:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"choice: {error}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise InvalidRequestError("choice: not a list of strings with at least one")
    return "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)
