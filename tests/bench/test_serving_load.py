"""kvferry bench: arrivals, lengths, prompts and prefixes."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from random import Random

import pytest

from bench.serving.arrivals import renewal, rescaled
from bench.serving.prompts import TokenIds, Words
from bench.serving.workload import SHAREGPT_PROMPT, Item, Segment, Uniform, Workload, parse_lengths
from protocol.errors import ConfigError

IDS = TokenIds(300, 3000)


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(variation: float) -> None:
    times = list(itertools.islice(renewal(4.0, variation, Random(1)), 40_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.pstdev(gaps) / 0.25 == pytest.approx(variation, rel=0.08, abs=1e-9)


def test_a_poisson_process_counts_as_its_distribution_says() -> None:
    """The number of arrivals in a second has its mean as its variance."""
    times = itertools.takewhile(lambda at: at < 5000, renewal(3.0, 1.0, Random(2)))
    counts = [0] * 5000
    for at in times:
        counts[int(at)] += 1
    assert statistics.mean(counts) == pytest.approx(3, rel=0.05)
    assert statistics.pvariance(counts) == pytest.approx(3, rel=0.1)


def test_rescaling_keeps_the_shape() -> None:
    assert rescaled([10, 10, 14], 4.0) == [0, 0, 0.5]
    assert rescaled([10, 10, 14], None) == [0, 0, 4]


def test_lengths() -> None:
    random = Random(3)
    draws = {
        text: [parse_lengths(text, SHAREGPT_PROMPT).draw(random) for _ in range(20_000)]
        for text in ("64", "10-20", "lognormal:100:0.5", "sharegpt")
    }
    assert set(draws["64"]) == {64}
    assert set(draws["10-20"]) == set(range(10, 21))
    assert statistics.mean(draws["lognormal:100:0.5"]) == pytest.approx(100, rel=0.03)
    assert statistics.pstdev(draws["lognormal:100:0.5"]) == pytest.approx(50, rel=0.06)
    assert statistics.mean(draws["sharegpt"]) == pytest.approx(857, rel=0.03)
    assert statistics.median(draws["sharegpt"]) < 780  # skewed, as conversations are


@pytest.mark.parametrize("text", ["", "0", "-3", "20-10", "0-4", "lognormal:0:1", "lognormal:1"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        parse_lengths(text, SHAREGPT_PROMPT)


def test_the_same_seed_gives_the_same_requests_and_another_others() -> None:
    def rendered(seed: int) -> list[tuple[float, list[int]]]:
        items = Workload(count=20, rate=2.0, prompt=Uniform(8, 32), seed=seed).items()
        return [(item.arrival, IDS.render(item.prompt)) for item in items]

    assert rendered(1) == rendered(1)
    assert not set(map(str, rendered(1))) & set(map(str, rendered(2)))


def test_groups_share_the_beginning_of_their_prompts() -> None:
    items = Workload(
        count=30, rate=None, prompt=Uniform(100, 100), prefix_groups=3, prefix_share=0.6
    ).items()
    prompts = [IDS.render(item.prompt) for item in items]
    assert {len(prompt) for prompt in prompts} == {100}
    assert len({tuple(prompt[:60]) for prompt in prompts}) == 3
    assert len({tuple(prompt[60:]) for prompt in prompts}) == 30


def test_mooncake_blocks_named_alike_are_alike(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 64, "hash_ids": [7, 8, 9]},
        {"timestamp": 500, "input_length": 1030, "output_length": 1, "hash_ids": [7, 8, 10]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    items = Workload(count=9, rate=4.0, trace=path, length_divisor=16).items()
    first, second = (IDS.render(item.prompt) for item in items)
    assert [item.arrival for item in items] == [0, 0.25]
    assert [item.output_tokens for item in items] == [4, 1]
    assert (len(first), len(second)) == (1100 // 16, 1030 // 16)
    assert first[:64] == second[:64]  # two blocks of 512 / 16
    assert first[32:64] != first[:32]


def test_a_trace_lends_its_lengths_to_other_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n9,20,3\n9.5,30,4\n")
    items = Workload(count=2, rate=2.0, variation=0.0, trace=path).items()
    assert items == [
        Item(0.0, (Segment("0 own 0", 10),), 2),
        Item(0.5, (Segment("0 own 1", 20),), 3),
    ]


def test_prompts_are_cut_to_leave_room_for_the_output() -> None:
    workload = Workload(
        count=4,
        rate=None,
        prompt=Uniform(90, 90),
        output=Uniform(20, 20),
        prefix_groups=1,
        max_len=60,
    )
    assert [item.prompt_tokens for item in workload.items()] == [40] * 4
    with pytest.raises(ConfigError, match="leave no prompt"):
        Workload(count=2, rate=None, output=Uniform(60, 60), max_len=60).items()


def test_words_cost_what_the_calibration_says() -> None:
    words = Words.calibrated((32, 75), (288, 587))
    assert words == Words(tokens_per_word=2.0, overhead=11.0)
    shared = Segment("group", 100)
    texts = [words.render((shared, Segment(key, 111))) for key in "ab"]
    assert [len(text.split()) for text in texts] == [100, 100]
    assert texts[0].split()[:44] == texts[1].split()[:44]
    assert texts[0] != texts[1]
    with pytest.raises(ConfigError, match="counts 9 tokens"):
        Words.calibrated((32, 9), (288, 9))
