"""Logprobs, grammars and salts from a dispatcher through its workers and back.

Through a prefill and a decode worker, and through a decode worker alone.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from protocol.errors import InvalidRequestError
from protocol.link import Server
from protocol.sampling import Grammar, SamplingParams, TokenLogprobs
from router.disaggregation import Disaggregation, Mode
from router.dispatch import Dispatcher
from router.generation import GenerationRequest, TokenChunk
from tests.checkpoints import CHECKPOINTS, reference_model, write_checkpoint
from tests.stack import START, Stack, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

EOS = 257
PROMPT = [random.Random(5).randrange(250) for _ in range(70)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 1, "maximum": 9999},
        "currency": {"enum": ["EUR", "USD"]},
        "paid": {"type": "boolean"},
    },
    "required": ["number", "currency", "paid"],
    "additionalProperties": False,
}


class Workers(Stack):
    """Worker processes alone: the router is the test's own."""

    def start_router(self) -> None:
        """See Stack."""

    def wait_for_workers(self, count: int, timeout: float = START) -> None:
        """See Stack."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[1, 0], ids=["disaggregated", "colocated"]
)
async def dispatcher(model: Path, request: pytest.FixtureRequest) -> AsyncIterator[Dispatcher]:
    workers = Workers(
        model,
        prefill=[()] * request.param,
        worker=["--dtype", "float32", "--max-num-batched-tokens", "32"],
    )
    link = Server(workers.control)
    mode: Mode = "always" if request.param else "never"
    dispatcher = Dispatcher(link, CollectorRegistry(), disaggregation=Disaggregation(mode))
    with workers:
        serving = asyncio.create_task(dispatcher.run())
        assert await asyncio.to_thread(
            eventually, lambda: dispatcher.not_ready_reason() is None, START
        )
        yield dispatcher
        await asyncio.to_thread(workers.close)
        serving.cancel()
    link.close()


async def generate(
    dispatcher: Dispatcher, sampling: SamplingParams, cache_salt: str = ""
) -> list[TokenChunk]:
    request = GenerationRequest(
        f"request-{random.randbytes(4).hex()}", PROMPT, sampling, timeout=60, cache_salt=cache_salt
    )
    return [chunk async for chunk in dispatcher.generate(request)]


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


async def test_logprobs_are_those_of_transformers(dispatcher: Dispatcher, model: Path) -> None:
    plain = await generate(dispatcher, GREEDY)
    assert all(c.logprobs is None and c.prompt_logprobs is None for c in plain)
    expected = tokens(plain)
    asking = GREEDY.model_copy(update={"logprobs": 2, "prompt_logprobs": 1})
    chunks = await generate(dispatcher, asking)
    assert tokens(chunks) == expected
    with torch.inference_mode():
        logits = reference_model(model)(torch.tensor([PROMPT + expected])).logits[0]
    logprobs = logits.log_softmax(-1)
    entries: list[TokenLogprobs | None] = [*(chunks[0].prompt_logprobs or [])]
    entries += [entry for chunk in chunks for entry in chunk.logprobs or []]
    assert entries[0] is None
    token_ids = PROMPT + expected
    assert len(entries) == len(token_ids)
    for position, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        before = logprobs[position - 1]
        assert entry.logprob == pytest.approx(float(before[token_ids[position]]), abs=2e-4)
        assert len(entry.top) == (1 if position < len(PROMPT) else 2)
        assert entry.top[0][0] == int(before.argmax())
    assert chunks[0].num_cached_tokens == 0  # computed anew, though it was cached
    assert all(c.prompt_logprobs is None and c.num_cached_tokens is None for c in chunks[1:])


async def test_caches_are_told_apart_by_their_salts(dispatcher: Dispatcher) -> None:
    expected = tokens(await generate(dispatcher, GREEDY))
    for salt, cached in (("", 64), ("a", 0), ("a", 64), ("b", 0)):
        chunks = await generate(dispatcher, GREEDY, cache_salt=salt)
        assert tokens(chunks) == expected
        assert chunks[0].num_cached_tokens == cached


async def test_grammars_bind_every_token(dispatcher: Dispatcher, model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    schema = Grammar(kind="json_schema", text=json.dumps(INVOICE))
    for seed in range(4):
        sampling = SamplingParams(
            max_tokens=400, seed=seed, grammar=schema, stop_token_ids=(EOS,), logprobs=0
        )
        chunks = await generate(dispatcher, sampling)
        assert chunks[-1].finish_reason == "stop"
        output = tokens(chunks)
        assert sum(len(chunk.logprobs or []) for chunk in chunks) == len(output)
        value = json.loads(tokenizer.decode(output[:-1], skip_special_tokens=False))
        assert [*value] == INVOICE["required"]
        assert isinstance(value["number"], int)
        assert 1 <= value["number"] <= 9999
    one_token = SamplingParams(
        max_tokens=1, grammar=Grammar(kind="regex", text="[Q]+"), stop_token_ids=(EOS,)
    )
    assert tokens(await generate(dispatcher, one_token)) == tokenizer.encode("Q").ids


async def test_a_malformed_grammar_is_the_clients_fault(dispatcher: Dispatcher) -> None:
    malformed = Grammar(kind="json_schema", text='{"not": {}}')
    sampling = SamplingParams(max_tokens=9, grammar=malformed, stop_token_ids=(EOS,))
    with pytest.raises(InvalidRequestError, match="not"):
        await generate(dispatcher, sampling)
    assert tokens(await generate(dispatcher, GREEDY))  # the workers go on
