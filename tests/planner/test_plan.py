"""Goodput, the best placement, and what the planner tells the operator."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cli.main import app
from planner.goodput import GRID, Candidate
from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.outcome import Outcome, Slo
from planner.placement import Placement
from planner.plan import BUDGETS, Planner
from planner.profile import PUBLISHED, WorkerProfile
from planner.simulator import simulate
from planner.workload import Lengths, Request, at_rate, generate, prompt_lengths
from protocol.errors import ConfigError
from tests.planner.profiles import profile

OPT_13B = PUBLISHED["a100-opt-13b"]
H200 = PUBLISHED["h200-llama-3.1-8b"].model_copy(update={"kv_tokens": 65_536})


def workload(prompt: Lengths, output: Lengths, count: int = 500) -> list[Request]:
    return list(generate(rate=1, count=count, prompt=prompt, output=output))


LONG_PROMPTS = workload(Lengths(4000, 0.5), Lengths(100, 0.5), count=120)
CHAT = workload(Lengths(250, 1.0), Lengths(100, 1.0), count=200)
FIXED = workload(Lengths(512), Lengths(64))


def test_attainment_counts_whoever_misses_either_deadline_or_is_rejected() -> None:
    outcome = Outcome()
    for ttft, tpot in [(1.0, 0.1), (1.0, 0.2), (2.0, 0.1)]:
        outcome.add(ttft, tpot)
    outcome.num_rejected = 1
    assert outcome.attainment(Slo(1.0, 0.1)) == 1 / 4
    assert outcome.attainment(Slo(2.0, 0.2)) == 3 / 4


def test_goodput_is_the_last_rate_that_keeps_the_slo() -> None:
    candidate = Candidate(FIXED, Placement(prefill=1, decode=1), H200)
    slo = Slo(0.1, 0.02)
    goodput = candidate.goodput(slo)
    assert candidate.outcome(goodput).attainment(slo) >= 0.9
    faster = simulate(at_rate(FIXED, goodput * GRID), candidate.placement, H200)
    assert faster.attainment(slo) < 0.9
    assert candidate.exceeds(goodput / GRID, slo)
    assert not candidate.exceeds(goodput, slo)
    fresh = Candidate(FIXED, Placement(prefill=1, decode=1), H200)
    assert fresh.goodput(replace(slo, ttft=0.05)) == candidate.goodput(replace(slo, ttft=0.05))


def test_an_slo_below_one_step_is_kept_at_no_rate() -> None:
    hopeless = Candidate(FIXED, Placement(prefill=1, decode=1), H200)
    assert hopeless.goodput(Slo(1.0, 1e-3)) == 0
    assert not hopeless.exceeds(0.0, Slo(1.0, 1e-3))


@pytest.mark.parametrize("slo", [Slo(0.5, 0.008), Slo(2.0, 0.05)])
def test_the_recommended_pools_are_as_good_as_the_best_of_all(slo: Slo) -> None:
    requests = LONG_PROMPTS[:60]
    recommended = Planner(requests, H200, 3).best_pools(slo).goodput
    assert recommended > 0
    for prefill in (1, 2):
        pools = Placement(prefill=prefill, decode=3 - prefill)
        for budget in BUDGETS:
            for local in prompt_lengths(requests):
                other = replace(pools, max_num_batched_tokens=budget, local_prefill_tokens=local)
                candidate = Candidate(requests, other, H200)
                assert not candidate.exceeds(recommended / 0.95, slo), other


VLLM_OPT_13B = OPT_13B.model_copy(  # DistServe's published fit to another engine, of the same GPU
    update={
        "latency": LinearLatency(
            prefill=PrefillFit(fixed=2.2052e-2, per_token=1.4051e-4, per_square=8.0766e-9),
            decode=DecodeFit(fixed=2.3475e-2, per_context=5.9293e-7, per_row=6.0727e-5),
        )
    }
)


@pytest.mark.parametrize("worker", [OPT_13B, VLLM_OPT_13B], ids=["distserve", "vllm"])
def test_distserves_order_of_placements(worker: WorkerProfile) -> None:
    """OPT-13B, 512 tokens in and 64 out, 0.4 s and 0.04 s (Zhong et al., OSDI '24, figure 1).

    A GPU that only prefills carries more than one that does both, one that only decodes yet more;
    pools carry what their narrower one does. Where decode carries well over 1.5 times what prefill
    does, as in the figure, 2P1D are ahead of 1P1D.
    """
    slo = Slo(0.4, 0.04)

    def goodput(placement: Placement, asked: Slo = slo) -> float:
        return Candidate(FIXED, placement, worker).goodput(asked)

    prefill_only = goodput(Placement(prefill=1, decode=6), Slo(0.4, 1e9))
    decode_only = goodput(Placement(prefill=6, decode=1), Slo(1e9, 0.04))
    colocated = max(goodput(Placement(colocated=1, max_num_batched_tokens=b)) for b in (512, 2048))
    assert decode_only > prefill_only > colocated
    for prefill, decode in [(1, 1), (2, 1), (1, 2)]:
        narrower = min(prefill * prefill_only, decode * decode_only)
        pools = goodput(Placement(prefill=prefill, decode=decode))
        assert pools == pytest.approx(narrower, rel=0.1)
        if prefill >= decode:
            assert pools / (prefill + decode) > colocated
    each = {n: goodput(Placement(prefill=n, decode=1)) / (n + 1) for n in (1, 2)}
    assert (each[2] > 1.1 * each[1]) == (decode_only > 1.65 * prefill_only)


def test_a_tight_tpot_wants_pools_and_a_loose_one_does_not() -> None:
    """The crossover: tokens that may be slow can share their steps with prompts."""
    tight = Planner(LONG_PROMPTS, H200, 4).plan(Slo(0.5, 0.006), with_map=False)
    loose = Planner(LONG_PROMPTS, H200, 4).plan(Slo(0.5, 0.1), with_map=False)
    assert tight.disaggregate
    assert tight.answer().startswith(f"Disaggregate: {tight.best.placement.prefill} prefill and")
    assert tight.best.placement.local_prefill_tokens == 0, "prefill has all prompts"
    assert "--local-prefill-tokens 0, carry" in tight.answer()
    budgets = {option.placement.max_num_batched_tokens for option in tight.variants}
    assert len(budgets) >= 2, "the neighbouring budgets are shown"
    assert not loose.disaggregate
    assert loose.answer().startswith("Do not disaggregate: 4 colocated workers")
    for plan in (tight, loose):
        assert plan.checked == pytest.approx(0.9, abs=0.05)
        best = max(plan.ratios, key=lambda option: option.goodput)
        assert plan.best.goodput == max(plan.colocated.goodput, best.goodput)


def test_decode_is_given_prompts_where_prefill_is_what_limits() -> None:
    """Two workers, hardly any tokens to decode: one of them would idle."""
    requests = workload(Lengths(1000, 0.5), Lengths(4), count=200)
    slow = profile(per_token=1e-4, decode=(1e-3, 0.0, 0.0), kv_tokens=65_536)
    plan = Planner(requests, slow, 2).plan(Slo(1.0, 0.5), with_map=False)
    pools = max(plan.ratios, key=lambda option: option.goodput)
    assert pools.placement.local_prefill_tokens > 0
    [without] = [v for v in plan.variants if v.placement.local_prefill_tokens == 0]
    assert pools.goodput > 1.3 * without.goodput
    if plan.disaggregate:
        longest = pools.placement.local_prefill_tokens
        assert f"--local-prefill-tokens {longest}, carry" in plan.answer()


def test_one_worker_has_no_pools() -> None:
    plan = Planner(CHAT, H200, 1).plan(Slo(0.5, 0.05))
    assert (plan.ratios, plan.slo_map) == ([], [])
    assert plan.answer().endswith("two pools need two workers.")


def test_an_impossible_slo_is_said_to_be_one() -> None:
    plan = Planner(CHAT, H200, 2).plan(Slo(0.5, 1e-3), with_map=False)
    assert plan.answer().startswith("No placement keeps this SLO")
    assert plan.checked is None


def test_a_workload_that_ends_before_queues_settle_is_pointed_out() -> None:
    notes = Planner(CHAT[:20], H200, 2).plan(Slo(0.5, 0.05), with_map=False).notes
    assert len(notes) == 1
    assert notes[0].startswith("20 requests last")
    slow = profile(decode=(1e-3, 0.0, 0.0), kv_tokens=65_536)
    assert Planner(CHAT, slow, 2).plan(Slo(2.0, 0.05), with_map=False).notes == []


def test_a_plan_needs_a_worker() -> None:
    with pytest.raises(ConfigError, match="at least one worker"):
        Planner(CHAT, H200, 0)


ASK = ["plan", "--profile", "h200-llama-3.1-8b", "--slo-ttft", "500", "--slo-tpot", "20"]
ASK += ["--gpus", "2", "--requests", "50"]
LENGTHS = ["--prompt-tokens", "500", "--output-tokens", "50"]


def test_the_command_prints_and_writes_json() -> None:
    shown = CliRunner().invoke(app, [*ASK, *LENGTHS])
    assert shown.exit_code == 0, shown.output
    for expected in ("isaggregate", "real schedulers", "1P1D", "2 colocated", "TTFT 250 ms"):
        assert expected in shown.stdout
    written = CliRunner().invoke(app, [*ASK, *LENGTHS, "--json"])
    record = json.loads(written.stdout)
    assert record["answer"] in " ".join(shown.stdout.split())
    assert record["best"]["goodput"] > 0
    assert len(record["slo_map"]) == 9


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "give --trace, or both"),
        (["--prompt-tokens", "5"], "give --trace, or both"),
        (["--trace", "none.csv"], "cannot read the trace"),
        (["--trace", "none.csv", *LENGTHS], "--trace has its own lengths"),
        ([*LENGTHS, "--profile", "none"], "neither a readable file"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, [*ASK, *options])
    assert result.exit_code == 1
    assert complaint in result.stderr


def test_rates_are_those_asked_for() -> None:
    arrivals = [request.arrival for request in at_rate(CHAT, 10.0)]
    assert arrivals[-1] == pytest.approx((len(CHAT) - 1) / 10)
