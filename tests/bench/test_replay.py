"""The generated cases of ``bench.replay``, and the cache that they are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.replay import BLOCK, HOT, HOT_BLOCKS, MAX_LEN, TOKENS, Case, failures, workload
from bench.routing import ideal_hits, spread
from bench.serving.record import Result
from engine.sequence import Sequence
from protocol.sampling import SamplingParams

COUNT = 200


def prompts(case: Case, folder: Path) -> list[list[int]]:
    items = workload(case, None, COUNT, 5.0, folder).items()
    assert len(items) == COUNT
    assert all(item.prompt_tokens + item.output_tokens <= MAX_LEN for item in items)
    assert items[-1].arrival == pytest.approx((COUNT - 1) / 5.0)
    return [TOKENS.render(item.prompt) for item in items]


def hits(token_ids: list[list[int]], num_blocks: int) -> float:
    sampling = SamplingParams(max_tokens=1)
    return ideal_hits(
        (Sequence("", ids, len(ids), sampling) for ids in token_ids), num_blocks, BLOCK
    )


def test_chats_repeat_what_was_said(tmp_path: Path) -> None:
    chats = prompts("trace", tmp_path)
    assert len({tuple(ids[: 2 * BLOCK]) for ids in chats}) == 1
    assert 0.5 < hits(chats, 1 << 20) < 0.95
    assert hits(chats, 1 << 20) > hits(chats, 300) > 0


def test_four_of_five_hot_prompts_begin_alike_and_the_others_share_nothing(tmp_path: Path) -> None:
    apart, hot = prompts("apart", tmp_path), prompts("hot", tmp_path)
    assert hits(apart, 1 << 20) == 0
    assert [len(ids) for ids in apart] == [len(ids) for ids in hot]
    long = [tuple(ids[: HOT_BLOCKS * BLOCK]) for ids in hot if len(ids) > HOT_BLOCKS * BLOCK]
    commonest = max(set(long), key=long.count)
    assert long.count(commonest) / len(long) == pytest.approx(HOT, abs=0.1)
    assert len(set(long)) == len(long) - long.count(commonest) + 1


def test_an_ideal_cache_finds_whole_blocks_before_the_last_token() -> None:
    prompt = list(range(2 * BLOCK))
    assert hits([prompt, prompt], 8) == pytest.approx(BLOCK / (2 * (2 * BLOCK - 1)))


def test_spread_is_the_most_over_the_mean() -> None:
    assert spread([3, 1, 2]) == 1.5


def test_failures_are_told_by_their_kinds_the_most_frequent_first() -> None:
    def failed(error: str, message: str) -> Result:
        return Result(0, 0.0, 0.0, 1.0, 1, 1, 0, (), error, message)

    seen = [failed("cut", "at [DONE]"), failed("http 429", "full"), failed("http 429", "busy")]
    assert list(failures(seen).items()) == [
        ("http 429", {"count": 2, "such_as": "busy"}),
        ("cut", {"count": 1, "such_as": "at [DONE]"}),
    ]
