"""What a decode worker does with sequences it runs when nobody cancels them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from decode.admission_events import Admit
from decode.scheduler import DecodeScheduler
from decode.worker import DecodeWorker
from engine.batch import Batch, StepOutput
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.messages import GenerateRequest, Message, RequestFailed, Tokens
from protocol.sampling import SamplingParams, TokenLogprobs
from tests.handoff_simulation import FINGERPRINT


@pytest.fixture
async def running() -> tuple[DecodeWorker, BlockPool, list[tuple[str, Message]]]:
    """A worker with two sequences: router a's ends at time 5, router b's at 9."""
    pool = BlockPool(8, 4)
    sent: list[tuple[str, Message]] = []
    worker = DecodeWorker(
        cast("Any", None),
        cast("Any", None),
        DecodeScheduler(pool, max_num_seqs=4, max_num_batched_tokens=8),
        FINGERPRINT,
        epoch=1,
        vocab_size=1000,
        peers=cast("Any", None),
        send=lambda router_id, message: sent.append((router_id, message)),
    )
    for router_id, deadline in (("a", 5.0), ("b", 9.0)):
        sequence = Sequence(f"of-{router_id}", [1, 2, 3, 4, 5], 4, SamplingParams(max_tokens=9))
        assert pool.reserve(sequence, 0)
        worker._do(Admit(sequence, router_id, deadline))
    return worker, pool, sent


LOGPROBS = TokenLogprobs(logprob=-1.5, rank=2, top=[])
Running = tuple[DecodeWorker, BlockPool, list[tuple[str, Message]]]


async def test_a_sequence_ends_at_its_deadline_and_its_router_hears_of_it(running: Running) -> None:
    worker, pool, sent = running
    worker._expire(4.9)
    assert (pool.num_used, sent) == (4, [])
    worker._expire(5.0)
    assert pool.num_used == 2
    [(router_id, failed)] = sent
    assert isinstance(failed, RequestFailed)
    assert (router_id, failed.request_id, failed.code) == ("a", "of-a", "deadline_exceeded")
    assert not worker.idle
    worker._expire(9.0)
    assert worker.idle


async def test_a_line_about_an_attempt_carries_the_answers_id(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _, _ = running
    again = GenerateRequest(
        request_id="of-a",
        token_ids=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(max_tokens=9),
        timeout=1.0,
    )
    worker.from_router("a", again)
    [line] = caplog.records
    assert line.getMessage() == "request of-a came twice, the second is ignored"
    assert vars(line)["fields"] == {"request_id": "of"}


async def test_a_sequence_that_the_engine_finds_wrong_fails_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, pool, sent = running

    class Engine:
        """Finds one sequence wrong, and stops the test when the other has sampled."""

        num_steps = 0

        async def run(self, batch: Batch) -> StepOutput:
            self.num_steps += 1
            if self.num_steps == 3:  # the other's prompt takes two steps
                raise EOFError
            logprobs = {row.sequence.request_id: LOGPROBS for row in batch.sampling_rows}
            token_ids = [7] * len(batch.sampling_rows)
            return StepOutput(token_ids, logprobs, failures={"of-a": "no such token"})

    monkeypatch.setattr(worker, "_engine", Engine())
    with pytest.raises(EOFError):
        await worker._steps()
    [(first, failed), (second, told)] = sent
    assert (first, second) == ("a", "b")
    assert isinstance(failed, RequestFailed)
    assert (failed.request_id, failed.code) == ("of-a", "invalid_request")
    assert failed.message == "no such token"
    assert isinstance(told, Tokens)
    [update] = told.updates
    assert (update.request_id, update.token_ids, update.logprobs) == ("of-b", [7], [LOGPROBS])
    assert pool.num_used == 2


async def test_a_lost_routers_sequences_end_and_the_others_go_on(running: Running) -> None:
    worker, pool, sent = running
    worker.drop_router("b")
    assert (pool.num_used, sent) == (2, [])
    worker.drop_router("a")
    assert worker.idle
    assert pool.num_used == 0
