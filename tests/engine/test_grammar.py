"""Structured output through the real engine, on a random model at temperature 1."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from protocol.sampling import Grammar, SamplingParams
from tests.engine.driver import sequences_for, step
from tests.engine.schemas import DOCUMENTS, SCHEMAS, Schema

BOS, EOS, END = 256, 257, 261  # END ends a turn; to the tokenizer it is not EOS
PROMPT = [BOS, 40, 50]
DEMO = Path(__file__).parents[2] / "cli" / "demo_model"


def load(path: Path) -> Engine:
    return Engine.load(
        EngineConfig(str(path), dtype="float32", device="cpu", block_size=16, num_blocks=4500)
    )


@pytest.fixture(scope="module")
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return load(path)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def params(grammar: Grammar, **options: Any) -> SamplingParams:
    defaults = {"max_tokens": 400, "seed": 7, "stop_token_ids": (EOS,), "grammar": grammar}
    return SamplingParams(**{**defaults, **options})


def of_schema(schema: Schema) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def lark(*rules: str) -> Grammar:
    return Grammar(kind="lark", text="\n".join(rules))


def outputs(engine: Engine, samplings: Iterable[SamplingParams]) -> list[list[int]]:
    """What sequences of their own grammars generate together, each until its end."""
    sequences = []
    for number, sampling in enumerate(samplings):
        count = engine.geometry.blocks_for(len(PROMPT) + sampling.max_tokens)
        blocks = list(range(number * count, (number + 1) * count))
        sequences.append(Sequence(str(number), list(PROMPT), len(PROMPT), sampling, blocks))
    while running := [s for s in sequences if s.finish_reason() is None]:
        step(engine, running, budget=1000)
    return [s.token_ids[s.num_prompt_tokens :] for s in sequences]


def text_of(tokenizer: Tokenizer, output: list[int]) -> str:
    """The text before the stop token, which must be there."""
    assert output[-1] in (EOS, END)
    text: str = tokenizer.decode(output[:-1], skip_special_tokens=False)
    return text


def likely_ends(tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """A bias towards what ends JSON values: a random model would rarely leave a string."""
    return ((EOS, 8.0), *((tokenizer.token_to_id(c), 8.0) for c in '"}],'))


def test_every_output_is_what_its_schema_says(engine: Engine, tokenizer: Tokenizer) -> None:
    samplings = [
        params(of_schema(s), seed=i, logit_bias=likely_ends(tokenizer))
        for i, s in enumerate(SCHEMAS)
    ]
    assert len(samplings) > 150
    ended = 0
    for schema, output in zip(SCHEMAS, outputs(engine, samplings), strict=True):
        if output[-1] != EOS:
            assert len(output) == 400
            continue
        ended += 1
        value = json.loads(text_of(tokenizer, output))
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        validator.validate(value)
    assert ended >= 0.9 * len(SCHEMAS)


def test_tokens_of_many_characters_keep_the_schema_too() -> None:
    engine = load(DEMO)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    stops = engine.model_config.eos_token_ids
    ended = 0
    samplings = [
        params(of_schema(schema), seed=seed, stop_token_ids=stops, max_tokens=150)
        for seed, schema in enumerate(DOCUMENTS)
    ]
    for schema, output in zip(DOCUMENTS, outputs(engine, samplings), strict=True):
        if output[-1] in stops:
            value = json.loads(tokenizer.decode(output[:-1], skip_special_tokens=False))
            Draft202012Validator(schema).validate(value)
            ended += 1
    assert ended > len(DOCUMENTS) / 2


REGEXES = [
    "[a-f0-9]{8}",
    "(foo|bar)+-[0-9]{2,4}",
    "\\d{4}-\\d{2}-\\d{2}",
    "[A-Z][a-z]{0,9}( [A-Z][a-z]{0,9}){1,2}",
    "<b>[^<]{1,9}</b>",
    "a?b?c?",
    "(é|ü|日){3}",
]


def test_an_output_matches_its_regex_as_a_whole(engine: Engine, tokenizer: Tokenizer) -> None:
    samplings = [params(Grammar(kind="regex", text=regex)) for regex in REGEXES]
    for regex, output in zip(REGEXES, outputs(engine, samplings), strict=True):
        assert re.fullmatch(regex, text_of(tokenizer, output))


def test_choices_are_taken_word_for_word_and_each_is_possible(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    choices = ["yes", "no", 'say "no"\n', "🙂", "a|b"]
    grammar = Grammar(kind="choice", text=json.dumps(choices))
    seen = outputs(engine, (params(grammar, seed=seed, temperature=9.0) for seed in range(60)))
    assert {text_of(tokenizer, output) for output in seen} == set(choices)


def test_json_object_is_any_object(engine: Engine, tokenizer: Tokenizer) -> None:
    grammar = Grammar(kind="json_object")
    bias = likely_ends(tokenizer)
    samplings = [params(grammar, seed=seed, logit_bias=bias) for seed in range(12)]
    ended = [output for output in outputs(engine, samplings) if output[-1] == EOS]
    values = [json.loads(text_of(tokenizer, output)) for output in ended]
    assert len(values) > 3
    assert all(isinstance(value, dict) for value in values)


def test_lark_keeps_a_recursive_grammar(engine: Engine, tokenizer: Tokenizer) -> None:
    grammar = lark('start: "(" start ")" | NUMBER', "NUMBER: /[0-9]{1,3}/")
    for output in outputs(engine, (params(grammar, seed=seed) for seed in range(10))):
        text = text_of(tokenizer, output)
        depth = len(re.match(r"\(*", text)[0])  # type: ignore[index]
        assert re.fullmatch(r"\(" * depth + "[0-9]{1,3}" + r"\)" * depth, text)


def test_an_output_taken_over_anywhere_goes_on_as_if_undisturbed(path: Path) -> None:
    grammar = of_schema(SCHEMAS[-4])
    sampling = params(grammar, min_tokens=3)
    [expected] = outputs(load(path), [sampling])
    assert len(expected) > 20
    for known in (1, 2, 11, len(expected) - 2, len(expected) - 1):
        engine = load(path)  # another worker, which has seen neither grammar nor sequence
        [sequence] = sequences_for(engine, [PROMPT + expected[:known]], sampling)
        sequence.num_prompt_tokens = len(PROMPT)
        while sequence.finish_reason() is None:
            step(engine, [sequence], budget=4)
        assert sequence.token_ids == PROMPT + expected


def test_a_preempted_output_goes_on_as_if_undisturbed(engine: Engine) -> None:
    sampling = params(of_schema(SCHEMAS[-4]))
    [expected] = outputs(engine, [sampling])
    [sequence] = sequences_for(engine, [PROMPT], sampling)
    while sequence.finish_reason() is None:
        step(engine, [sequence], budget=1000)
        if sequence.num_output_tokens % 7 == 0:
            engine.rows.zero_()
            sequence.num_computed = 0
    assert sequence.token_ids == PROMPT + expected


def test_a_row_draws_the_same_with_and_without_constrained_neighbours(engine: Engine) -> None:
    free = SamplingParams(max_tokens=30, seed=3)
    digits = params(Grammar(kind="regex", text="[0-9]{30}"), seed=3)
    [alone] = outputs(engine, [free])
    assert outputs(engine, [digits, free, digits])[1] == alone


# Where a sequence may end --------------------------------------------------------------------

DIGITS = Grammar(kind="regex", text="[0-9]{2,40}")
ONE_WORD = Grammar(kind="choice", text='["word"]')
LIKE_TO_END = ((EOS, 100.0),)


def test_a_stop_token_comes_only_where_the_text_may_end(engine: Engine) -> None:
    [output] = outputs(engine, [params(DIGITS, logit_bias=LIKE_TO_END)])
    assert (len(output), output[-1]) == (3, EOS)


def test_every_stop_token_ends_the_text_and_eos_is_none_unless_named(engine: Engine) -> None:
    for stops in ((END,), (EOS, END), (9999, END)):
        [output] = outputs(engine, [params(ONE_WORD, stop_token_ids=stops)])
        assert output[-1] in stops
        assert len(output) == len("word") + 1


def test_a_stop_token_that_the_grammar_uses_is_only_an_end(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    five = tokenizer.token_to_id("5")
    sampling = params(DIGITS, stop_token_ids=(five,), logit_bias=((five, 100.0),))
    [output] = outputs(engine, [sampling])
    assert (output.index(five), len(output)) == (2, 3)


def test_min_tokens_hold_while_the_grammar_can_go_on(engine: Engine) -> None:
    [output] = outputs(engine, [params(DIGITS, min_tokens=20, logit_bias=LIKE_TO_END)])
    assert (len(output), output[-1]) == (21, EOS)
    [output] = outputs(engine, [params(ONE_WORD, min_tokens=20)])
    assert (len(output), output[-1]) == (len("word") + 1, EOS)


def test_max_tokens_cut_the_text(engine: Engine) -> None:
    [output] = outputs(engine, [params(ONE_WORD, max_tokens=2)])
    assert len(output) == 2


def test_without_a_stop_token_there_is_no_structured_output() -> None:
    with pytest.raises(ValueError, match="stop token"):
        params(DIGITS, stop_token_ids=())


# What goes wrong -----------------------------------------------------------------------------


def failure(engine: Engine, sampling: SamplingParams, output: list[int] | None = None) -> str:
    """Why a step fails for a sequence; its neighbour must sample all the same."""
    sequences = sequences_for(engine, [PROMPT, PROMPT], SamplingParams(max_tokens=3))
    sequences[0].sampling = sampling
    sequences[0].token_ids += output or []
    rows = tuple(BatchRow(s, 0, s.num_tokens) for s in sequences)
    step_output = engine.run(Batch(rows))
    assert len(step_output.token_ids) == 2
    [(request_id, reason)] = step_output.failures.items()
    assert request_id == sequences[0].request_id
    return reason


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(kind="json_schema", text="{"), "json_schema: "),
        (Grammar(kind="json_schema", text='{"not": {}}'), 'Unimplemented keys: \\["not"\\]'),
        (Grammar(kind="regex", text="("), "unclosed group"),
        (Grammar(kind="choice", text="[1]"), "list of strings"),
        (lark("start: nowhere"), 'unknown name: "nowhere"'),
    ],
)
def test_a_malformed_grammar_fails_its_request_alone(
    engine: Engine, grammar: Grammar, reason: str
) -> None:
    for _ in range(2):
        assert re.search(reason, failure(engine, params(grammar)))


def test_an_output_that_breaks_its_grammar_fails(engine: Engine) -> None:
    assert "breaks the grammar" in failure(engine, params(DIGITS), output=[70, 71])


def test_a_dead_end_fails(engine: Engine, tokenizer: Tokenizer) -> None:
    five = tokenizer.token_to_id("5")
    grammar = Grammar(kind="regex", text="55")
    assert "allows no token" in failure(engine, params(grammar, stop_token_ids=(five,)))
    only_here = params(ONE_WORD, stop_token_ids=(9999,))
    word = tokenizer.encode("word", add_special_tokens=False).ids
    assert "may only end here" in failure(engine, only_here, output=word)


def test_a_checkpoint_without_tokenizer_says_so(path: Path, tmp_path: Path) -> None:
    for file in path.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    assert "tokenizer.json" in failure(load(tmp_path), params(DIGITS))
    sequence = Sequence("free", list(PROMPT), len(PROMPT), SamplingParams(max_tokens=1))
    sequence.block_table = [0]
    assert not load(tmp_path).run(Batch((BatchRow(sequence, 0, 3),))).failures
