"""Several sequences, log probabilities, echo, bias and structured output from real workers."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.stack import Stack

PROMPT = "The os module"
SCHEMA = {
    "type": "object",
    "properties": {"paid": {"type": "boolean"}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["paid", "currency"],
    "additionalProperties": False,
}


@pytest.fixture
def client(demo: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, **body: Any) -> Any:
    return client.completions.create(
        **{"model": "test", "prompt": PROMPT, "max_tokens": 8, "seed": 3, **body}
    )


def test_the_first_of_several_equals_the_only_one(client: openai.OpenAI, demo: Stack) -> None:
    only = complete(client).choices[0]
    several = complete(client, n=3).choices
    assert (several[0].text, several[0].finish_reason) == (only.text, only.finish_reason)
    assert len({choice.text for choice in several}) == 3
    assert [choice.text for choice in complete(client, n=3).choices] == [c.text for c in several]
    demo.assert_idle()


def test_echoed_output_has_the_log_probabilities_it_was_given(client: openai.OpenAI) -> None:
    """What decode says of its tokens, prefill says of the same tokens in a prompt."""
    made = complete(client, temperature=0, logprobs=1, extra_body={"return_token_ids": True})
    choice = made.choices[0]
    ids = [*choice.prompt_token_ids, *choice.token_ids]
    echoed = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    given = choice.logprobs.token_logprobs
    assert len(given) == 8
    assert echoed.text == PROMPT + choice.text
    assert echoed.logprobs.token_logprobs[-8:] == pytest.approx(given, abs=0.05)
    assert echoed.logprobs.tokens[-8:] == choice.logprobs.tokens
    assert echoed.logprobs.token_logprobs[0] is None


def test_bias_and_structure_bind(client: openai.OpenAI, demo: Stack) -> None:
    made = complete(client, logit_bias={"56": 100}, max_tokens=3)
    assert made.choices[0].text == "SSS"
    for seed in range(3):
        answer = client.chat.completions.create(
            model="test",
            messages=[{"role": "user", "content": "Is it paid?"}],
            seed=seed,
            max_tokens=150,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "bill", "schema": SCHEMA},
            },
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert list(value) == ["paid", "currency"]
        assert value["currency"] in ("EUR", "USD")
    demo.assert_idle()


def test_cached_prompt_tokens_are_told(client: openai.OpenAI) -> None:
    ids = list(range(100, 164))
    salt = {"cache_salt": "test_choices"}
    cached = [
        complete(client, prompt=ids, extra_body=salt).usage.prompt_tokens_details.cached_tokens
        for _ in range(3)  # the third meets one of the two prefill workers again
    ]
    assert cached[0] == 0
    assert 0 < cached[2] < len(ids)


def test_sequences_of_a_prompt_share_its_kv() -> None:
    """The others compute and move no more than what is no whole block of the prompt."""
    block_size, n, length = 16, 4, 130
    body = {
        "model": "test",
        "prompt": list(range(100, 100 + length)),
        "max_tokens": 12,
        "ignore_eos": True,
    }
    with Stack("demo", worker=["--block-size", str(block_size)]) as pair:
        answer = pair.client.post("/v1/completions", json={**body, "n": n})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == length
        prefill, decode = pair.metrics("prefill"), pair.metrics("decode")
    whole_blocks = length // block_size * block_size
    computed = prefill["kvferry_prompt_tokens_computed_total"]
    assert computed == length + (n - 1) * (length - whole_blocks)
    assert decode["kvferry_prefix_cache_hits_total"] == (n - 1) * whole_blocks
