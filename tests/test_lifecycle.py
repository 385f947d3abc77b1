"""A request's life in the router: every order and every repetition of its workers' messages."""

from __future__ import annotations

import asyncio
from itertools import permutations
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import DeadlineError, KvferryError, OverloadedError, WorkerLostError
from protocol.geometry import Fingerprint, KVGeometry
from protocol.link import Server
from protocol.messages import (
    Cancel,
    FirstToken,
    Message,
    PrefillRequest,
    Register,
    RequestFailed,
    Role,
    TokenUpdate,
    WorkerLoad,
)
from protocol.sampling import SamplingParams
from router.dispatch import Dispatcher
from router.generation import GenerationRequest, TokenChunk
from router.lifecycle import (
    Action,
    CancelOn,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Event,
    Fail,
    RequestLifecycle,
    RequestState,
    WorkerLost,
)

FAILURE = RequestFailed(request_id="r", code="overloaded", message="full")
CANCELS = [CancelOn("p"), CancelOn("d")]


def first(token_id: int = 100, last: bool = False) -> FirstToken:
    return FirstToken(
        request_id="r",
        token_id=token_id,
        finish_reason="stop" if last else None,
        num_cached_tokens=0,
    )


def update(index: int, count: int = 1, last: bool = False) -> TokenUpdate:
    """Tokens 100 + index onwards."""
    return TokenUpdate(
        request_id="r",
        index=index,
        token_ids=[100 + index + i for i in range(count)],
        finish_reason="length" if last else None,
    )


def lifecycle() -> RequestLifecycle:
    return RequestLifecycle("r", "p", "d")


def delivered(actions: list[Action]) -> list[int]:
    return [t for action in actions if isinstance(action, Deliver) for t in action.chunk.token_ids]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Event]]:
    """A number of tokens and, shuffled, messages that carry them all, some twice or in pieces."""
    num_tokens = draw(st.integers(1, 8))
    events: list[Event] = [first(last=num_tokens == 1)]
    index = 1
    while index < num_tokens:
        count = draw(st.integers(1, num_tokens - index))
        events.append(update(index, count, last=index + count == num_tokens))
        index += count
    for _ in range(draw(st.integers(0, 4)) if num_tokens > 1 else 0):
        start = draw(st.integers(1, num_tokens - 1))
        count = draw(st.integers(1, num_tokens - start))
        events.append(update(start, count, last=start + count == num_tokens))
    events += draw(st.lists(st.sampled_from(events), max_size=3))
    return num_tokens, draw(st.permutations(events))


@settings(max_examples=400, deadline=None)
@given(history=histories())
def test_each_token_is_delivered_once_in_order_whatever_the_order_of_arrival(
    history: tuple[int, list[Event]],
) -> None:
    num_tokens, events = history
    request = lifecycle()
    actions = [action for event in events for action in request.handle(event)]
    assert delivered(actions) == [*range(100, 100 + num_tokens)]
    reasons = [a.chunk.finish_reason for a in actions if isinstance(a, Deliver)]
    assert [r for r in reasons if r] == reasons[-1:]
    assert len(reasons) == len(actions)  # it ended well: nothing to cancel
    assert request.state is RequestState.ENDED


interruptions: st.SearchStrategy[Event] = st.sampled_from(
    [FAILURE, WorkerLost("p"), WorkerLost("d"), WorkerLost("x"), ClientGone(), DeadlinePassed()]
)


@settings(max_examples=400, deadline=None)
@given(history=histories(), data=st.data())
def test_one_terminal_outcome_and_nothing_after_it(
    history: tuple[int, list[Event]], data: st.DataObject
) -> None:
    num_tokens, events = history
    for interruption in data.draw(st.lists(interruptions, min_size=1, max_size=3)):
        events.insert(data.draw(st.integers(0, len(events))), interruption)
    request = lifecycle()
    ends = 0
    tokens: list[int] = []
    for event in events:
        over = request.state is RequestState.ENDED
        actions = request.handle(event)
        if over:
            assert actions == []
        tokens += delivered(actions)
        failed = any(isinstance(action, Fail) for action in actions)
        finished = any(isinstance(a, Deliver) and a.chunk.finish_reason for a in actions)
        gone = isinstance(event, ClientGone) and not over
        ends += failed + finished + gone
        assert (failed or finished or gone) == (request.state is RequestState.ENDED and not over)
        if failed or gone:
            assert actions[-2:] == CANCELS
    assert ends == 1
    assert tokens == [*range(100, 100 + len(tokens))]
    assert len(tokens) <= num_tokens


def test_states() -> None:
    request = lifecycle()
    states = [request.state]
    assert request.handle(first()) == [Deliver(TokenChunk([100]))]
    states.append(request.state)
    assert request.handle(update(1, last=True)) == [Deliver(TokenChunk([101], "length"))]
    states.append(request.state)
    assert states == [RequestState.PREFILLING, RequestState.DECODING, RequestState.ENDED]


def test_decodes_tokens_wait_for_the_first() -> None:
    request = lifecycle()
    assert request.handle(update(1)) == []
    assert request.handle(update(2, last=True)) == []
    assert request.handle(first()) == [Deliver(TokenChunk([100, 101, 102], "length"))]


def test_a_shorter_repetition_does_not_replace_what_waits() -> None:
    for events in permutations([update(1, 3, last=True), update(1), update(1, 2)]):
        request = lifecycle()
        for event in events:
            assert request.handle(event) == []
        assert delivered(request.handle(first())) == [100, 101, 102, 103]
        assert request.state is RequestState.ENDED


@pytest.mark.parametrize("events", [[], [first()], [update(1)], [update(1), update(2)]])
def test_prefill_is_needed_until_the_first_token_is_here_and_decode_has_taken_over(
    events: list[Event],
) -> None:
    request = lifecycle()
    for event in events:
        request.handle(event)
    [fail, *cancels] = request.handle(WorkerLost("p"))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, WorkerLostError)
    assert cancels == CANCELS


def test_prefill_is_not_needed_once_decode_has_taken_over() -> None:
    request = lifecycle()
    request.handle(first())
    request.handle(update(1))
    assert request.handle(WorkerLost("p")) == []
    assert delivered(request.handle(update(2, last=True))) == [102]


def test_errors_keep_their_kind() -> None:
    for event, kind in ((FAILURE, OverloadedError), (DeadlinePassed(), DeadlineError)):
        [fail, *_] = lifecycle().handle(event)
        assert isinstance(fail, Fail)
        assert type(fail.error) is kind


def test_a_client_that_leaves_gets_no_error() -> None:
    assert lifecycle().handle(ClientGone()) == CANCELS


# Through the dispatcher: which workers hear of what -------------------------------------------


ROLES: tuple[Role, Role] = ("prefill", "decode")


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Message]] = []

    def send(self, peer: bytes, message: Message) -> bool:
        self.sent.append((peer, message))
        return True


def registration(role: Role, epoch: int = 1) -> Register:
    geometry = KVGeometry(num_kv_heads=1, num_layers=1, block_size=4, head_dim=4, dtype="float32")
    return Register(
        worker_id=role,
        epoch=epoch,
        role=role,
        model="m",
        fingerprint=Fingerprint(weights_digest="00", rope="none", geometry=geometry),
        vocab_size=10,
        max_model_len=100,
        pid=1,
        host="h",
        control="c",
        data=b"",
        transport="t",
        metrics="",
        load=WorkerLoad(),
    )


def dispatched() -> tuple[Dispatcher, Wire, asyncio.Queue[TokenChunk | KvferryError]]:
    """A dispatcher whose only request has delivered its first token."""
    wire = Wire()
    dispatcher = Dispatcher(cast("Server", wire))
    for role in ROLES:
        dispatcher._receive_one(role.encode(), registration(role))
    request = GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=4))
    running = dispatcher._dispatch(request)
    assert isinstance(wire.sent[-1][1], PrefillRequest)
    dispatcher._receive_one(b"prefill", first())
    assert running.output.get_nowait() == TokenChunk([100])
    return dispatcher, wire, running.output


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_restarts_between_first_token_and_hand_off_fails_the_request(
    role: Role,
) -> None:
    dispatcher, wire, output = dispatched()
    dispatcher._receive_one(role.encode(), registration(role, epoch=2))
    assert type(output.get_nowait()) is WorkerLostError
    assert output.empty()
    assert dispatcher.num_running == 0
    other = b"decode" if role == "prefill" else b"prefill"
    cancelled = [peer for peer, message in wire.sent if isinstance(message, Cancel)]
    assert cancelled == [other]  # the new incarnation never had it


async def test_closing_the_generator_cancels_on_both_workers_and_strays_are_answered() -> None:
    wire = Wire()
    dispatcher = Dispatcher(cast("Server", wire))
    for role in ROLES:
        dispatcher._receive_one(role.encode(), registration(role))
    request = GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=4))
    chunks = dispatcher.generate(request)
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0)
    dispatcher._receive_one(b"prefill", first())
    assert await waiting == TokenChunk([100])
    await chunks.aclose()
    cancelled = [peer for peer, message in wire.sent if isinstance(message, Cancel)]
    assert cancelled == [b"prefill", b"decode"]
    assert dispatcher.num_running == 0
    dispatcher._receive_one(b"decode", first())
    assert wire.sent[-1] == (b"decode", Cancel(request_id="r"))
