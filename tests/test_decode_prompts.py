"""Prompts that decode computes itself: how they get in, and what is told of them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from decode.admission import Admission
from decode.admission_events import (
    Abandon,
    Action,
    Admit,
    Asked,
    Cancelled,
    Report,
    RouterLost,
    Tick,
)
from decode.grant import CANCELS_KEPT
from decode.prompt_rate import PromptRate
from decode.scheduler import DecodeScheduler
from decode.worker import DecodeWorker
from engine.batch import Batch, StepOutput
from engine.block_pool import BlockPool
from protocol.messages import Cancel, FirstToken, GenerateRequest, Message, RequestFailed, Tokens
from protocol.sampling import SamplingParams, TokenLogprobs
from tests.fake_model import VOCAB
from tests.handoff_simulation import EPOCH, FINGERPRINT

BLOCK = 4  # tokens
NUM_BLOCKS = 8


def request(
    name: str = "r", num_tokens: int = 10, num_output: int = 0, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        token_ids=[1] * num_tokens,
        num_prompt_tokens=num_tokens - num_output,
        sampling=SamplingParams(**{"max_tokens": 9, **sampling}),
        timeout=5.0,
    )


class Scene:
    """An admission whose scheduler runs as many sequences as ``running`` says."""

    def __init__(self, **options: Any) -> None:
        self.pool = BlockPool(NUM_BLOCKS, BLOCK)
        self.running: int | None = 0
        self.admission = Admission(
            self.pool,
            FINGERPRINT,
            EPOCH,
            vocab_size=VOCAB,
            headroom=lambda: self.running,
            **options,
        )

    def ask(self, asked: GenerateRequest, now: float = 0.0, router: str = "a") -> list[Action]:
        return self.admission.handle(Asked(router, asked), now)

    def fill(self) -> list[int]:
        blocks = self.pool.allocate(self.pool.num_free)
        assert blocks is not None
        return blocks


def refusal(actions: list[Action]) -> tuple[str, str]:
    [report] = actions
    assert isinstance(report, Report)
    return report.message.code, report.message.message


def test_with_room_a_prompt_is_let_in_at_once_with_blocks_for_all_of_it() -> None:
    scene = Scene()
    [admit] = scene.ask(request())
    assert isinstance(admit, Admit)
    assert (admit.router_id, admit.deadline, admit.waited) == ("a", 5.0, 0.0)
    assert len(admit.sequence.block_table) == 3
    assert (admit.sequence.num_computed, admit.sequence.recomputed) == (0, False)
    assert scene.admission.grants.num_requests == 0


def test_one_that_goes_on_from_another_worker_is_recomputed() -> None:
    [admit] = Scene().ask(request(num_output=3))
    assert isinstance(admit, Admit)
    assert admit.sequence.recomputed
    assert admit.sequence.num_output_tokens == 3


def test_without_room_prompts_wait_their_turn_and_tell_how_long() -> None:
    scene = Scene()
    blocks = scene.fill()
    assert scene.ask(request("large", 20)) == []
    assert scene.ask(request("small", 4), now=1.0) == []
    assert scene.admission.grants.pending_tokens == 24
    scene.pool.release(blocks[:4])  # enough for the second alone, which does not overtake
    assert scene.admission.handle(Tick(), 2.0) == []
    scene.pool.release(blocks[4:])
    admits = scene.admission.handle(Tick(), 3.0)
    assert [a.sequence.request_id for a in admits if isinstance(a, Admit)] == ["large", "small"]
    assert [a.waited for a in admits if isinstance(a, Admit)] == [3.0, 2.0]


def test_prompts_leave_running_sequences_room_to_grow() -> None:
    scene = Scene()
    scene.running = NUM_BLOCKS - 2
    assert scene.ask(request()) == []
    scene.running = None  # preempted sequences go first
    assert scene.admission.handle(Tick(), 0.0) == []
    scene.running = NUM_BLOCKS - 3
    assert len(scene.admission.handle(Tick(), 0.0)) == 1


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        (request(num_tokens=0), "invalid_request", "the prompt is empty"),
        (request(num_tokens=30), "context_length_exceeded", "needs 10 KV blocks"),
        (
            request().model_copy(update={"token_ids": [VOCAB]}),
            "protocol_error",
            f"token id {VOCAB} with a vocabulary of {VOCAB}",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_its_reason(
    asked: GenerateRequest, code: str, message: str
) -> None:
    found, told = refusal(Scene().ask(asked))
    assert found == code
    assert message in told


def test_a_leaving_worker_and_a_full_queue_refuse() -> None:
    scene = Scene(max_pending=1)
    scene.fill()
    assert scene.ask(request("a")) == []
    assert refusal(scene.ask(request("b")))[0] == "overloaded"
    scene.admission.grants.leaving = True
    assert refusal(scene.ask(request("c"))) == ("unavailable", "this decode worker is leaving")


def test_one_that_waits_ends_with_its_deadline_its_cancel_or_its_router() -> None:
    scene = Scene()
    blocks = scene.fill()
    for name, router in (("late", "a"), ("cancelled", "a"), ("orphaned", "b")):
        assert scene.ask(request(name), now=0.0, router=router) == []
    assert scene.admission.handle(Cancelled("cancelled"), 1.0) == [Abandon("cancelled")]
    assert scene.admission.handle(RouterLost("b"), 1.0) == []
    code, message = refusal(scene.admission.handle(Tick(), 5.0))
    assert code == "deadline_exceeded"
    assert "pending" in message
    scene.pool.release(blocks)
    assert scene.admission.handle(Tick(), 5.0) == []
    assert (scene.admission.grants.num_open, scene.pool.num_used) == (0, 0)


def test_a_cancel_that_overtakes_its_request_is_remembered() -> None:
    scene = Scene()
    scene.admission.handle(Cancelled("r"), 0.0)
    assert refusal(scene.ask(request())) == ("unavailable", "request r was cancelled")
    for number in range(CANCELS_KEPT):
        scene.admission.handle(Cancelled(f"other-{number}"), 0.0)
    assert len(scene.ask(request())) == 1


def score(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(token_id), rank=1, top=[])


class Engine:
    """Samples 7; scores the prompts that ask for it, token i of a row as -i."""

    def __init__(self, num_steps: int) -> None:
        self._steps_left = num_steps

    def expect(self, sampling: SamplingParams) -> None:
        pass

    async def run(self, batch: Batch) -> StepOutput:
        if self._steps_left == 0:
            await asyncio.Event().wait()
        self._steps_left -= 1
        scored = {
            row.sequence.request_id: [score(row.start + 1 + i) for i in range(len(tokens))]
            for row in batch.rows
            if (tokens := row.scored_tokens)
        }
        return StepOutput([7] * len(batch.sampling_rows), prompt_logprobs=scored)


async def serve(num_steps: int, *asked: GenerateRequest) -> tuple[DecodeWorker, list[Message]]:
    """What a worker says in so many steps, of at most 6 prompt tokens."""
    sent: list[Message] = []
    worker = DecodeWorker(
        cast("Any", Engine(num_steps)),
        cast("Any", None),
        DecodeScheduler(BlockPool(32, BLOCK), max_num_seqs=4, max_num_batched_tokens=6),
        FINGERPRINT,
        epoch=EPOCH,
        vocab_size=VOCAB,
        peers=cast("Any", None),
        send=lambda _, message: sent.append(message),
    )
    for one in asked:
        worker.from_router("a", one)
    steps = asyncio.create_task(worker._steps())
    for _ in range(20 * (num_steps + 1)):
        await asyncio.sleep(0)
    steps.cancel()
    await asyncio.gather(steps, return_exceptions=True)
    return worker, sent


async def test_the_first_token_comes_with_what_prefill_would_tell() -> None:
    worker, sent = await serve(3, request(prompt_logprobs=0))
    first, *others = sent
    assert isinstance(first, FirstToken)
    assert (first.request_id, first.index, first.token_id) == ("r", 0, 7)
    assert first.num_cached_tokens == 0
    assert first.prompt_logprobs == [None, *map(score, range(1, 10))]  # of two chunks
    assert first.account.keys() == {"grant", "prefill"}
    assert [type(message) for message in others] == [Tokens]
    [update] = others[0].updates
    assert (update.index, update.token_ids, update.account) == (1, [7], {})
    assert worker._rate.tokens_per_second > 0
    worker.from_router("a", Cancel(request_id="r"))
    assert worker.idle


async def test_an_output_of_one_token_ends_with_the_first() -> None:
    worker, [first] = await serve(1, request(num_tokens=3, max_tokens=1))
    assert isinstance(first, FirstToken)
    assert first.finish_reason == "length"
    assert worker.idle


async def test_a_resumed_output_goes_on_at_its_index() -> None:
    _, [first] = await serve(1, request(num_tokens=5, num_output=2))
    assert isinstance(first, FirstToken)
    assert (first.index, first.prompt_logprobs) == (2, None)


async def test_a_refused_prompt_is_told_to_its_router() -> None:
    _, [failed] = await serve(0, request(num_tokens=0), request("other"))
    assert isinstance(failed, RequestFailed)
    assert failed.request_id == "r"


def test_the_rate_is_of_the_time_that_prompts_add() -> None:
    rate = PromptRate()
    assert rate.tokens_per_second == 0
    for _ in range(200):
        rate.step(0, 8, 0.02)
    rate.step(100, 8, 0.03)
    assert rate.tokens_per_second == pytest.approx(10_000, rel=0.01)
    alone = PromptRate()
    alone.step(0, 8, 0.02)
    alone.step(100, 0, 0.02)  # nothing but the prompt
    assert alone.tokens_per_second == pytest.approx(5000)
    alone.step(100, 8, 0.01)  # less than a step that only generates: not all of it was free
    assert alone.tokens_per_second < 10_000
