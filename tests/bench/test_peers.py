"""The comparison with peers: its loop, its record and its clock, on peers made up here."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.peers.compare import Measure, Peer, PeerError, compare
from bench.peers.install import RECIPES, STAMP, Site
from bench.peers.process import running
from bench.peers.record import Figures, Record
from bench.peers.systems import METRICS, summarize

SCRIPTS = Path(__file__).parents[2] / "bench" / "peers" / "scripts"
CORES = tuple(os.sched_getaffinity(0))
QUIET = Console(quiet=True)


def peer(name: str, figures: dict[str, float], asked: list[str]) -> Peer:
    """A peer that knows some cases' figures and fails at any other."""

    @contextlib.contextmanager
    def start(bound: float) -> Iterator[tuple[dict[str, Any], Measure]]:
        def measure(case: str) -> tuple[Figures, Any]:
            asked.append(f"{name} {case}")
            if case not in figures:
                raise PeerError(f"{name} cannot do {case}")
            return {"rate": figures[case]}, [figures[case]]

        yield {"version": "1"}, measure

    return Peer(name, start)


def measured(*rates: float) -> dict[str, Any]:
    """A cell of so many rounds."""
    rounds = [{"figures": {"rate": rate}, "runs": [rate]} for rate in rates]
    return {"figures": {"rate": statistics.median(rates)}, "rounds": rounds}


def cells(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["cells"]


def test_one_failing_peer_costs_the_others_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "out.json", resume=False)
    peers = [peer("bad", {"a": 1.0}, []), peer("good", {"a": 2.0, "b": 3.0}, [])]
    compare(peers, ["a", "b"], record, 1.0, QUIET)
    assert cells(tmp_path / "out.json") == {
        "bad": {"a": measured(1.0), "b": {"failed": "bad cannot do b"}},
        "good": {"a": measured(2.0), "b": measured(3.0)},
    }
    assert record.failures() == {"bad": "bad cannot do b"}


def test_a_resumed_run_asks_only_for_what_has_no_figures(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    compare([peer("p", {"a": 1.0}, [])], ["a", "b"], Record(path, resume=False), 1.0, QUIET)
    asked: list[str] = []
    again = [peer("p", {"b": 2.0}, asked)]
    compare(again, ["a", "b"], Record(path, resume=True), 1.0, QUIET)
    compare(again, ["a", "b"], Record(path, resume=True), 1.0, QUIET)
    assert asked == ["p b"]
    assert cells(path)["p"]["b"] == measured(2.0)


def test_rounds_take_turns_and_their_median_counts(tmp_path: Path) -> None:
    asked: list[str] = []
    figures = {"a": 1.0}
    peers = [peer("p", figures, asked), peer("q", {"a": 5.0}, asked)]
    record = Record(tmp_path / "out.json", resume=False)
    compare(peers, ["a"], record, 1.0, QUIET)
    figures["a"] = 4.0
    compare(peers, ["a"], record, 1.0, QUIET, rounds=2)
    del figures["a"]  # a failure leaves what there is
    compare(peers, ["a"], record, 1.0, QUIET, rounds=3)
    assert asked == ["p a", "q a", "p a", "q a", "p a", "q a"]
    assert cells(tmp_path / "out.json")["p"]["a"] == measured(1.0, 4.0)


def test_ratios_are_to_the_baseline_of_the_same_case(tmp_path: Path) -> None:
    record = Record(tmp_path / "out.json", resume=False)
    peers = [peer("ours", {"a": 2.0}, []), peer("theirs", {"a": 3.0, "b": 5.0}, [])]
    compare(peers, ["a", "b"], record, 1.0, QUIET)
    columns = [list(column.cells) for column in record.table("rate", "", "ours").columns]
    assert columns == [["ours", "theirs"], ["2 (1.00×)", "3 (1.50×)"], ["failed", "5"]]


ECHO = "import sys; print('1', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)"
FALL = "import sys; print('ValueError: no such thing', file=sys.stderr); sys.exit(3)"
SLEEP = "import time; time.sleep(600)"


def test_a_process_answers_line_by_line(tmp_path: Path) -> None:
    with running(
        [sys.executable, "-c", ECHO], {}, CORES, tmp_path / "log", answers=True
    ) as process:
        assert process.ask(None, 60.0) == 1
        assert process.ask({"case": 1}, 60.0) == {"case": 1}
        assert process.ask({"case": 2}, 60.0) == {"case": 2}


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    with (
        running([sys.executable, "-c", FALL], {}, CORES, tmp_path / "log", answers=True) as process,
        pytest.raises(PeerError, match="ValueError: no such thing"),
    ):
        process.ask(None, 60.0)


def test_a_silent_process_runs_out_of_its_time_and_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import os; print(os.getpid(), flush=True); {SLEEP}"]
    with running(command, {}, CORES, tmp_path / "log", answers=True) as process:
        pid = process.ask(None, 60.0)
        with pytest.raises(PeerError, match="ran out of its time"):
            process.ask({}, 0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_environment_of_another_recipe_does_not_count(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (tmp_path / "nixl").mkdir()
    (tmp_path / "nixl" / STAMP).write_text(RECIPES["nixl"].stamp)
    site.require("nixl")
    (tmp_path / "nixl" / STAMP).write_text(RECIPES["mooncake"].stamp)
    with pytest.raises(PeerError, match=r"bench\.peers install nixl"):
        site.require("nixl")


def test_a_systems_figures() -> None:
    answers = [(0.0, [1.0, 1.1, 1.2]), (2.0, [5.0, 5.3, 5.4])]
    figures = summarize(answers, output_tokens=3, seconds=6.0)
    assert figures == pytest.approx(dict(zip(METRICS, (2000.0, 100.0, 300.0, 1.0), strict=True)))


def test_an_answer_cut_short_is_no_figure() -> None:
    with pytest.raises(PeerError, match="64 tokens"):
        summarize([(0.0, [1.0, 1.1])], output_tokens=64, seconds=1.0)


class SlowEngine:
    """Takes one second a step; prompts two at a time first, then everybody a token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prompts: dict[int, list[int]] = {}
        self.running: list[int] = []

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        self.prompts[number] = prompt

    def advance(self) -> list[int]:
        self.now += 1.0
        waiting = [number for number in self.prompts if number not in self.running][:2]
        self.running += waiting
        return waiting or list(self.running)

    def clear(self) -> None:
        self.prompts.clear()
        self.running.clear()


@pytest.fixture
def engine_loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as the engines' scripts see it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("engine_loop")
    yield module
    for name in ("engine_loop", "lines"):
        sys.modules.pop(name, None)


def test_decode_counts_tokens_after_every_sequence_has_its_first(
    engine_loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SlowEngine()
    monkeypatch.setattr(engine_loop.time, "perf_counter", lambda: engine.now)
    case = {"kind": "decode", "sequences": 5, "context": 8, "steps": 4}
    assert engine_loop.measure(engine, case, 2000, 0) == [5.0] * engine_loop.WINDOWS
    assert engine.now == 3 + 4 * engine_loop.WINDOWS


def test_prefill_counts_the_prompts_tokens(
    engine_loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SlowEngine()
    monkeypatch.setattr(engine_loop.time, "perf_counter", lambda: engine.now)
    case = {"kind": "prefill", "tokens": 96, "repeats": 2}
    assert engine_loop.measure(engine, case, 2000, 0) == [96.0, 96.0]


def test_prompts_are_the_same_for_all_and_share_no_prefix(engine_loop: Any) -> None:
    first, second = (engine_loop.prompt(number, 64, 32000) for number in (1, 2))
    assert first == engine_loop.prompt(1, 64, 32000)
    assert first[0] != second[0]
