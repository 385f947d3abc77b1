"""Several sequences of a prompt, log probabilities and echo, alone and together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from protocol.errors import WorkerLostError
from protocol.sampling import TokenLogprobs
from router.generation import GenerationRequest, TokenChunk
from router.text import TextModel
from tests.router.conftest import HANG, PATIENCE, Router, Script, eventually, routers

PROMPT = "Some words"
QUESTION: list[Any] = [{"role": "user", "content": "Hi?"}]
CACHED = 3
WIDTH = 5  # alternatives that the scripted model knows


def score(token_id: int, number: int) -> TokenLogprobs:
    """Made up, but a function of the token."""
    top = [((token_id + rank) % 300, -0.5 - rank) for rank in range(number)]
    return TokenLogprobs(logprob=-(token_id % 7) / 4, rank=1, top=top)


def model(request: GenerationRequest) -> Script:
    """Tokens from the seed alone, two a chunk, with what the request asks to be told."""
    sampling = request.sampling
    draw = random.Random(sampling.seed)
    ids = [draw.randrange(4, 300) for _ in range(sampling.max_tokens)]
    chunks = []
    for start in range(0, len(ids), 2):
        part = ids[start : start + 2]
        told = sampling.logprobs
        chunks.append(
            TokenChunk(
                part,
                "length" if start + 2 >= len(ids) else None,
                None if told is None else [score(token_id, told) for token_id in part],
            )
        )
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    if sampling.prompt_logprobs is not None:
        rest = request.prompt_token_ids[1:]
        prompt_logprobs = [None, *(score(token_id, sampling.prompt_logprobs) for token_id in rest)]
    first = chunks[0]
    chunks[0] = TokenChunk(
        first.token_ids, first.finish_reason, first.logprobs, prompt_logprobs, CACHED
    )
    return chunks


@pytest.fixture(scope="module")
def shared(text: TextModel) -> Iterator[Router]:
    with routers(text) as start:
        yield start()


@pytest.fixture
def router(shared: Router) -> Router:
    shared.generator.requests.clear()
    shared.generator.scripts = model
    return shared


@pytest.fixture
def client(router: Router) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)


def whole(client: openai.OpenAI, **body: Any) -> Completion:
    answer: Completion = client.completions.create(model="test", seed=7, **body)
    for choice in answer.choices:
        assert choice.logprobs is None or len(choice.logprobs.tokens or []) > 0
    return answer


def streamed(client: openai.OpenAI, **body: Any) -> dict[int, dict[str, Any]]:
    """Each choice of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    stream = client.completions.create(model="test", seed=7, stream=True, **body)
    for chunk in stream:
        for part in chunk.choices:
            choice = choices.setdefault(
                part.index, {"text": "", "reason": None, "logprobs": [[], [], [], []]}
            )
            choice["text"] += part.text
            choice["reason"] = part.finish_reason
            if part.logprobs is not None:
                for known, new in zip(choice["logprobs"], columns(part.logprobs), strict=True):
                    known += new
    return choices


def columns(logprobs: Any) -> list[Any]:
    return [
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
    ]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_options_do_not_disturb_one_another(
    client: openai.OpenAI, n: int, logprobs: int | None, echo: bool, stopped: bool
) -> None:
    plain = whole(client, prompt=PROMPT, max_tokens=9).choices[0].text
    stop = [plain[4:6]] if stopped else []
    shown = plain[: plain.index(stop[0])] if stopped else plain
    body: dict[str, Any] = {"n": n, "logprobs": logprobs, "echo": echo, "stop": stop}
    answer = whole(client, prompt=PROMPT, max_tokens=9, **body)
    parts = streamed(client, prompt=PROMPT, max_tokens=9, **body)
    assert [choice.index for choice in answer.choices] == [*range(n)] == sorted(parts)
    assert answer.choices[0].text == (PROMPT + shown if echo else shown)
    assert len({choice.text for choice in answer.choices}) == n
    for choice in answer.choices:
        part = parts[choice.index]
        assert (part["text"], part["reason"]) == (choice.text, choice.finish_reason)
        if logprobs is None:
            assert choice.logprobs is None
            continue
        tokens, values, tops, offsets = columns(choice.logprobs)
        assert part["logprobs"] == [tokens, values, tops, offsets]
        assert len(tokens) == len(values) == len(tops) == len(offsets)
        assert offsets[0] == 0
        assert all(left <= right for left, right in pairwise(offsets))
        assert (values[0] is None) == echo
        for token, value, top in zip(tokens, values, tops, strict=True):
            if value is not None:
                assert token in top
                assert len(top) <= logprobs + 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED


def test_offsets_point_at_their_tokens(client: openai.OpenAI, router: Router) -> None:
    words = " are written: Héllo, wörld 😀."
    ids = router.text.tokenizer.encode(words, add_special_tokens=False).ids
    prompt = router.text.tokenizer.encode(PROMPT).ids
    router.generator.scripts = lambda _: [
        TokenChunk([], prompt_logprobs=[None, *(score(i, 0) for i in prompt[1:])]),
        *(TokenChunk([i], logprobs=[score(i, 0)]) for i in ids),
        TokenChunk([], "length"),
    ]
    choice = whole(client, prompt=PROMPT, max_tokens=99, echo=True, logprobs=0).choices[0]
    assert choice.text == PROMPT + words
    assert choice.logprobs is not None
    tokens, _, _, offsets = columns(choice.logprobs)
    assert len(tokens) == len(prompt) + len(ids)
    assert offsets[-1] == len(choice.text) - len(tokens[-1])
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith(("bytes:", "<|")):  # special tokens are not shown
            assert choice.text.startswith(token, offset)


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_of_little(
    client: openai.OpenAI, router: Router, logprobs: int | None, max_tokens: int
) -> None:
    body: dict[str, Any] = {"echo": True, "max_tokens": max_tokens, "logprobs": logprobs}
    answer = whole(client, prompt=PROMPT, **body)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    assert (choice.text == PROMPT) == (max_tokens == 0)
    assert choice.finish_reason == "length"
    assert streamed(client, prompt=PROMPT, **body)[0]["text"] == choice.text
    if logprobs is not None:
        num_prompt = len(router.generator.requests[0].prompt_token_ids)
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == num_prompt + max_tokens


def test_prompts_and_sequences_are_numbered_by_prompt(client: openai.OpenAI) -> None:
    answer = whole(client, prompt=["one", [5, 6, 7]], n=2, echo=True, max_tokens=2)
    texts = [choice.text for choice in answer.choices]
    assert [text.startswith("one") for text in texts] == [True, True, False, False]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == 3 + len(whole_prompt(client))
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2 * CACHED


def whole_prompt(client: openai.OpenAI) -> list[int]:
    answer = httpx.post(
        str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": "one"}, timeout=PATIENCE
    )
    ids: list[int] = answer.json()["tokens"]
    return ids


def test_best_of_shows_those_with_the_best_mean(client: openai.OpenAI) -> None:
    every = whole(client, prompt=PROMPT, n=5, logprobs=0, max_tokens=6)

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs)) / 6

    expected = [choice.text for choice in sorted(every.choices, key=mean, reverse=True)[:2]]
    answer = whole(client, prompt=PROMPT, n=2, best_of=5, max_tokens=6)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30


@pytest.mark.parametrize("script", [[HANG], [TokenChunk([70]), HANG]])
def test_the_others_wait_until_decode_has_the_prompt(router: Router, script: Script) -> None:
    router.generator.scripts = lambda _: script
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(router.url + "/v1/completions", json={"prompt": "x", "n": 4}, timeout=0.5)
    assert len(router.generator.requests) == 1
    assert eventually(lambda: router.generator.num_open == 0)


def test_the_others_start_when_decode_has_the_prompt(router: Router) -> None:
    router.generator.scripts = lambda _: [TokenChunk([70]), TokenChunk([71]), HANG]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(router.url + "/v1/completions", json={"prompt": "x", "n": 4}, timeout=0.5)
    assert len(router.generator.requests) == 4
    assert eventually(lambda: router.generator.num_open == 0)


def test_a_failure_of_the_first_ends_all(router: Router) -> None:
    router.generator.scripts = lambda _: [WorkerLostError("gone")]
    assert router.post("/v1/completions", prompt="x", n=4).status_code >= 500
    assert len(router.generator.requests) == 1


def test_chat_logprobs(client: openai.OpenAI, router: Router) -> None:
    ask: dict[str, Any] = {"messages": QUESTION, "max_tokens": 8, "seed": 7, "n": 2}
    ask |= {"logprobs": True, "top_logprobs": 2, "model": "test"}
    answer = client.chat.completions.create(**ask)
    ChatCompletion.model_validate(answer.model_dump())
    stream = list(client.chat.completions.create(**ask, stream=True))
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert len(content) == 8
        assert all(len(entry.top_logprobs) == 2 for entry in content)
        raw = b"".join(bytes(entry.bytes or []) for entry in content)
        assert raw.decode(errors="replace").startswith((choice.message.content or "")[:2])
        parts = [
            entry
            for chunk in stream
            for part in chunk.choices
            if part.index == choice.index and part.logprobs is not None
            for entry in part.logprobs.content or []
        ]
        assert [part.model_dump() for part in parts] == [entry.model_dump() for entry in content]


def test_without_a_seed_every_sequence_has_its_own(router: Router) -> None:
    assert router.post("/v1/completions", prompt=["x", "x"], n=2).status_code == 200
    assert len({request.sampling.seed for request in router.generator.requests}) == 4


def test_options_reach_the_workers(router: Router) -> None:
    router.post(
        "/v1/completions",
        prompt="x",
        max_tokens=3,
        n=2,
        seed=5,
        logit_bias={"9": 2, "10": -100.0},
        cache_salt="tenant",
        user="someone",
    )
    first, second = router.generator.requests
    assert first.sampling.logit_bias == ((9, 2.0), (10, -100.0))
    assert first.cache_salt == second.cache_salt == "tenant"
    assert first.sampling.seed == 5
    assert second.sampling.seed not in (5, 6)
