"""Every combination of options gives the same answer over two pools as in one worker.

What one worker alone says is what transformers says; so is then what prefill and decode say
together, whatever is asked for, as a stream or as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import reference_greedy
from tests.stack import Stack

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "cli" / "demo_model"
EOS = 1
MAX_LEN = 96  # tokens of prompt and output
WORKER = ["--dtype", "float32", "--max-model-len", f"{MAX_LEN}", "--max-num-batched-tokens", "64"]
AT_ONCE = 32  # requests
PROMPT = "The os module"
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Is it paid?"}]},
}
SCHEMA = {
    "type": "object",
    "properties": {"paid": {"type": "boolean"}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["paid", "currency"],
    "additionalProperties": False,
}
BILL = {"name": "bill", "schema": SCHEMA}
SAMPLED = {
    "model": "test",
    "temperature": 0.8,
    "seed": 11,
    "logit_bias": {str(EOS): 6},  # so that some sequences end by themselves
    "return_token_ids": True,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
# Within a word of the prose and within a key of the schema, across the borders of tokens.
STOPS = ["ro", "urr"]
MIN_TOKENS = 4
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "n": [{}, {"n": 3}],
    "stop": [{}, {"stop": STOPS}],
    "ignore_eos": [{}, {"ignore_eos": True}],
    "min_tokens": [{}, {"min_tokens": MIN_TOKENS}],
    "max_tokens": [{}, {"max_tokens": 1}],
    "schema": [{}, {"response_format": {"type": "json_schema", "json_schema": BILL}}],
}
OF_PATH: dict[str, dict[str, list[dict[str, Any]]]] = {
    "/v1/completions": {
        "logprobs": [{}, {"logprobs": 2}],
        "echo": [{}, {"echo": True}],
    },
    "/v1/chat/completions": {
        "logprobs": [{}, {"logprobs": True, "top_logprobs": 2}],
    },
}


@dataclass
class Choice:
    """One sequence as the client has it in the end."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # those with log probabilities
    offsets: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[list[float]] = field(default_factory=list)  # best first

    def take(self, part: Mapping[str, Any]) -> None:
        """Add a whole choice, or a chunk of one."""
        said = part.get("message") or part.get("delta") or part
        self.text += said.get("text") or said.get("content") or ""
        self.token_ids += part["token_ids"]
        self.prompt_token_ids += part.get("prompt_token_ids", [])
        self.finish_reasons += [part["finish_reason"]] if part["finish_reason"] else []
        scores = part["logprobs"] or {}
        for entry in scores.get("content") or []:
            self.tokens.append(entry["token"])
            self.logprobs.append(entry["logprob"])
            self.top.append(sorted((top["logprob"] for top in entry["top_logprobs"]), reverse=True))
        self.tokens += scores.get("tokens", [])
        self.offsets += scores.get("text_offset", [])
        self.logprobs += scores.get("token_logprobs", [])
        for named in scores.get("top_logprobs", []):
            self.top.append(sorted((named or {}).values(), reverse=True))


@dataclass
class Answer:
    """A status, and what came with it."""

    status: int
    refused: str | None = None  # the parameter
    choices: list[Choice] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, content: Mapping[str, Any]) -> None:
        """Add a whole body, or an event of a stream."""
        for part in content["choices"]:
            while len(self.choices) <= part["index"]:
                self.choices.append(Choice())
            if "token_ids" in part:  # a chat's opening has none
                self.choices[part["index"]].take(part)
        counts = content.get("usage") or {}
        self.prompt_tokens += counts.get("prompt_tokens", 0)
        self.completion_tokens += counts.get("completion_tokens", 0)


def ask(stack: Stack, path: str, body: Mapping[str, Any]) -> Answer:
    """One request, whole or as a stream."""
    reply: httpx.Response = stack.client.post(path, json={**ASKED[path], **SAMPLED, **body})
    answer = Answer(reply.status_code)
    if reply.status_code != 200:
        answer.refused = reply.json()["error"]["param"]
    elif body.get("stream"):
        *events, last = [line[6:] for line in reply.text.splitlines() if line]
        assert last == "[DONE]"
        for event in events:
            answer.take(json.loads(event))
    else:
        answer.take(reply.json())
    return answer


def ask_all(stack: Stack, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Answer]:
    """Many at the same time."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = [threads.submit(ask, stack, path, body) for path, body in requests]
        return [answer.result() for answer in answers]


def combinations(path: str) -> Iterator[dict[str, Any]]:
    """Every one, the illegal included, each as a body; none is streamed."""
    for parts in product(*OPTIONS.values(), *OF_PATH[path].values()):
        yield {name: value for part in parts for name, value in part.items()}


def illegal(body: Mapping[str, Any]) -> str | None:
    """The parameter by which a combination is refused."""
    if "response_format" in body and "ignore_eos" in body:
        return "ignore_eos"
    return "min_tokens" if body.get("min_tokens", 0) > body.get("max_tokens", MAX_LEN) else None


def check(body: Mapping[str, Any], answer: Answer) -> None:
    """What each option promises, whoever answers."""
    assert answer.completion_tokens == sum(len(c.token_ids) for c in answer.choices)
    assert len(answer.choices) == body.get("n", 1)
    structured, min_tokens = "response_format" in body, body.get("min_tokens", 0)
    for choice in answer.choices:
        [reason] = choice.finish_reasons
        text = choice.text.removeprefix(PROMPT) if "echo" in body else choice.text
        assert len(choice.token_ids) <= body.get("max_tokens", MAX_LEN)
        assert len(choice.token_ids) >= min_tokens or (structured and reason == "stop")
        if reason == "stop" and "stop" not in body:
            assert choice.token_ids[-1] == EOS
            assert "ignore_eos" not in body
            assert not structured or json.loads(text).keys() == SCHEMA["properties"].keys()
        if "stop" in body and not min_tokens:
            assert not any(stop in text for stop in STOPS)
        if "echo" in body:
            assert choice.text.startswith(PROMPT)
        if "logprobs" in body:
            echoed = len(choice.prompt_token_ids) if "echo" in body else 0
            ended = choice.token_ids[-1] == EOS and reason == "stop"
            assert len(choice.tokens) == echoed + len(choice.token_ids) - ended
            assert len(choice.logprobs) == len(choice.top) == len(choice.tokens)


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal: log probabilities within what float32 rounds."""
    left, right = asdict(one), asdict(other)
    for mine, others in zip(left["choices"], right["choices"], strict=True):
        for name in ("logprobs", "top"):
            for scores, expected in zip(mine.pop(name), others.pop(name), strict=True):
                if scores != pytest.approx(expected, abs=1e-3):
                    return False
    return left == right


@pytest.fixture(scope="module")
def stacks() -> Iterator[tuple[Stack, Stack]]:
    """Two pools, and one worker that does all."""
    with Stack("demo", worker=WORKER) as pair, Stack("demo", prefill=[], worker=WORKER) as alone:
        yield pair, alone


def test_both_say_what_transformers_says(stacks: tuple[Stack, Stack]) -> None:
    prompts = [[5, 6, 7], [800] * 20, [*range(100, 170)]]
    greedy = {"temperature": 0, "logit_bias": {}, "max_tokens": 20, "ignore_eos": True}
    requests = [("/v1/completions", {**greedy, "prompt": prompt}) for prompt in prompts]
    expected = [reference_greedy(DEMO, prompt, 20) for prompt in prompts]
    for stack in stacks:
        assert [a.choices[0].token_ids for a in ask_all(stack, requests)] == expected


@pytest.mark.parametrize("path", ASKED)
def test_all_combinations(stacks: tuple[Stack, Stack], path: str) -> None:
    bodies = [*combinations(path)]
    streams = [{**body, **STREAM} for body in bodies]
    requests = [(path, body) for body in (*bodies, *streams)]
    by_pair, by_one = [ask_all(stack, requests) for stack in stacks]
    expected = by_one[: len(bodies)]
    assert [answer.refused for answer in expected] == [*map(illegal, bodies)]
    for answers in (by_one[len(bodies) :], by_pair[: len(bodies)], by_pair[len(bodies) :]):
        for body, answer, wanted in zip(bodies, answers, expected, strict=True):
            assert same(answer, wanted), (body, answer, wanted)
    for body, answer in zip(bodies, expected, strict=True):
        if answer.refused is None:
            check(body, answer)
    reasons = {reason for answer in expected for c in answer.choices for reason in c.finish_reasons}
    assert reasons == {"stop", "length"}
    for stack in stacks:
        stack.assert_idle()


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("best_of", "/v1/completions", {"best_of": 3, "stream": True}),
    ("best_of", "/v1/completions", {"best_of": 2, "n": 3}),
    ("best_of", "/v1/chat/completions", {"best_of": 3, "stream": True}),
    ("n", "/v1/completions", {"n": 100, "prompt": ["a", "b"]}),
    ("max_tokens", "/v1/completions", {"max_tokens": 0}),
    ("max_tokens", "/v1/completions", {"max_tokens": MAX_LEN}),
    ("max_completion_tokens", "/v1/chat/completions", {"max_completion_tokens": MAX_LEN}),
    ("stream_options", "/v1/completions", {"stream_options": {"include_usage": True}}),
    ("echo", "/v1/chat/completions", {"echo": True}),
    ("top_logprobs", "/v1/chat/completions", {"top_logprobs": 2}),
    ("top_logprobs", "/v1/completions", {"top_logprobs": 2}),
    ("suffix", "/v1/completions", {"suffix": "x"}),
    ("guided_choice", "/v1/completions", {"guided_regex": "a+", "guided_choice": ["a"]}),
    ("stop", "/v1/completions", {"stop": [*"abcde"]}),
    ("logit_bias", "/v1/completions", {"logit_bias": {"4096": 1}}),
]


@pytest.mark.parametrize(("param", "path", "body"), REFUSED)
def test_what_does_not_go_together_is_refused_by_name(
    stacks: tuple[Stack, Stack], param: str, path: str, body: dict[str, Any]
) -> None:
    for stack in stacks:
        answer = ask(stack, path, body)
        assert (answer.status, answer.refused) == (400, param)


MOVED = "kvferry_kv_transfer_bytes_total{direction=received}"
NO_NEXT_TOKEN: list[dict[str, Any]] = [
    {"logit_bias": {str(EOS): 100}},
    {"logit_bias": {"56": 100}, "stop_token_ids": [56]},
    {"max_tokens": 1},
    {"max_tokens": 1, "n": 3},
    {"max_tokens": 0, "echo": True, "logprobs": 1},
]


@pytest.mark.parametrize("body", NO_NEXT_TOKEN)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_with_its_first_token_moves_no_kv(
    stacks: tuple[Stack, Stack], body: dict[str, Any], stream: bool
) -> None:
    pair, alone = stacks
    before = pair.metrics("decode")[MOVED]
    # Not cached, and computed in one step: else KV leaves before the first token is known.
    fresh = {"prompt": [*range(100, 150)], "cache_salt": f"{body} {stream}"}
    asked = {**fresh, **body, **(STREAM if stream else {})}
    answers = [ask(stack, "/v1/completions", asked) for stack in (pair, alone)]
    assert same(*answers)
    num_tokens = 0 if body.get("max_tokens") == 0 else 1
    assert {len(choice.token_ids) for choice in answers[0].choices} == {num_tokens}
    pair.assert_idle()
    assert pair.metrics("decode")[MOVED] == before


@pytest.mark.parametrize("index", [0, 1])
def test_requests_of_one_prompt_that_come_at_once_compute_it_once(
    stacks: tuple[Stack, Stack], index: int
) -> None:
    stack, role = stacks[index], ("prefill", "decode")[index]
    counted = "kvferry_prompt_tokens_computed_total"
    before = stack.metrics(role)[counted]
    num_requests, length, whole_blocks = 8, 90, 80
    body = {"prompt": [*range(200, 200 + length)], "cache_salt": "at once", "max_tokens": 3}
    answers = ask_all(stack, [("/v1/completions", body)] * num_requests)
    assert all(same(answer, answers[0]) for answer in answers)
    computed = stack.metrics(role)[counted] - before
    assert computed == length + (num_requests - 1) * (length - whole_blocks)
