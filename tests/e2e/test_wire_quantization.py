"""KV that travels in 8 bits between real processes: what is moved, and what it does to answers."""

from __future__ import annotations

from pydoc_data import topics

import pytest
import torch

from tests.stack import Stack

pytestmark = pytest.mark.slow

B = 16  # tokens in a block
NEW = 9  # tokens generated
TILES, HEAD_DIM = 2 * 4 * 2, 64  # of the demo model's blocks: kv heads * layers * 2
EXACT_BYTES = TILES * B * HEAD_DIM * 4
PACKED_BYTES = TILES * B * (HEAD_DIM + 4)  # a byte for each element, a scale for each token
# Where greedy answers part they stay apart, so many short ones are compared.
PROMPTS = [topics.topics["compound"][start : start + 500] for start in range(0, 48_000, 2000)]
EXACT = ("--dtype", "float32", "--block-size", str(B))  # a step's rounding depends on no batch


def answers(stack: Stack) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    found = []
    for prompt in PROMPTS:
        body = {
            "model": "test",
            "prompt": prompt,
            "max_tokens": NEW,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = stack.client.post("/v1/completions", json=body).raise_for_status().json()
        found.append(answer["choices"][0]["token_ids"])
    return found


def moved(stack: Stack) -> tuple[float, float]:
    """Bytes of KV that prefill sent and decode received."""
    sent = stack.metrics("prefill")["kvferry_kv_transfer_bytes_total{direction=sent}"]
    return sent, stack.metrics("decode")["kvferry_kv_transfer_bytes_total{direction=received}"]


@pytest.fixture(scope="module")
def exact() -> tuple[list[list[int]], float]:
    """The answers when KV travels as it is, and the blocks that travelled."""
    with Stack("demo", worker=EXACT) as stack:
        tokens = answers(stack)
        sent, received = moved(stack)
    assert sent == received
    assert sent % EXACT_BYTES == 0
    return tokens, sent / EXACT_BYTES


@pytest.mark.parametrize(("kind", "agreement"), [("int8", 0.95), ("fp8", 0.7)])
def test_fewer_bytes_and_the_same_answers(
    exact: tuple[list[list[int]], float], kind: str, agreement: float
) -> None:
    expected, num_blocks = exact
    with Stack("demo", worker=(*EXACT, "--wire-quantization", kind)) as stack:
        found = answers(stack)
        assert moved(stack) == (num_blocks * PACKED_BYTES,) * 2
        assert answers(stack) == found  # on blocks in decode's prefix cache, as they arrived
        stack.assert_idle()
    same = torch.tensor(found) == torch.tensor(expected)
    assert same[:, 0].all()  # prefill's, from what it computed
    assert same.float().mean() >= agreement


def test_workers_that_disagree_are_kept_apart() -> None:
    with Stack("demo", worker=EXACT, prefill=[("--wire-quantization", "int8")]) as stack:
        body = {"model": "test", "prompt": PROMPTS[0], "max_tokens": 4}
        answer = stack.client.post("/v1/completions", json=body)
        assert answer.status_code == 503
        assert "wire_quantization: 'int8' here, 'none' there" in answer.text
