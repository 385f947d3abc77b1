"""A request's life in the router: every order and every repetition of its workers' messages."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import (
    DeadlineError,
    InvalidRequestError,
    KvferryError,
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from protocol.messages import FirstToken, TokenUpdate
from protocol.sampling import TokenLogprobs
from router.generation import TokenChunk
from router.lifecycle import TRANSITIONS, RequestLifecycle, RequestState
from router.lifecycle_events import (
    Action,
    AttemptFailed,
    CancelOn,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Event,
    Fail,
    NoWorkers,
    Placed,
    Retry,
    RouterEnds,
    Shed,
    WorkerLeft,
    WorkerLost,
)

FULL = AttemptFailed("p", OverloadedError("full"))
FATAL = AttemptFailed("p", InvalidRequestError("no"))
CANCELS = [CancelOn("p", "r#1"), CancelOn("d", "r#1")]


def first(index: int = 0, last: bool = False, attempt: int = 1) -> FirstToken:
    """Token 100 + index."""
    return FirstToken(
        request_id=f"r#{attempt}",
        index=index,
        token_id=100 + index,
        finish_reason="stop" if last else None,
        num_cached_tokens=0,
    )


def update(index: int, count: int = 1, last: bool = False, attempt: int = 1) -> TokenUpdate:
    """Tokens 100 + index onwards."""
    return TokenUpdate(
        request_id=f"r#{attempt}",
        index=index,
        token_ids=[100 + index + i for i in range(count)],
        finish_reason="length" if last else None,
    )


def placed(max_retries: int = 0) -> RequestLifecycle:
    """A request whose first attempt was given to two workers."""
    request = RequestLifecycle("r", max_retries)
    assert request.handle(Placed("p", "d")) == []
    return request


def delivered(actions: list[Action]) -> list[int]:
    return [t for action in actions if isinstance(action, Deliver) for t in action.chunk.token_ids]


def failure(actions: list[Action]) -> KvferryError | None:
    return next((action.error for action in actions if isinstance(action, Fail)), None)


@st.composite
def histories(
    draw: st.DrawFn, num_tokens: int | None = None, start: int = 0, attempt: int = 1
) -> tuple[int, list[Event]]:
    """A number of tokens and, shuffled, an attempt's messages with all from ``start`` on.

    Some come twice or in pieces.
    """
    end = num_tokens or draw(st.integers(1, 8))
    events: list[Event] = [first(start, start + 1 == end, attempt)]
    index = start + 1
    while index < end:
        count = draw(st.integers(1, end - index))
        events.append(update(index, count, index + count == end, attempt))
        index += count
    for _ in range(draw(st.integers(0, 4)) if end - start > 1 else 0):
        index = draw(st.integers(start + 1, end - 1))
        count = draw(st.integers(1, end - index))
        events.append(update(index, count, index + count == end, attempt))
    events += draw(st.lists(st.sampled_from(events), max_size=3))
    return end, draw(st.permutations(events))


@settings(max_examples=400, deadline=None)
@given(history=histories())
def test_each_token_is_delivered_once_in_order_whatever_the_order_of_arrival(
    history: tuple[int, list[Event]],
) -> None:
    num_tokens, events = history
    request = placed()
    actions = [action for event in events for action in request.handle(event)]
    assert delivered(actions) == [*range(100, 100 + num_tokens)]
    reasons = [a.chunk.finish_reason for a in actions if isinstance(a, Deliver)]
    assert [r for r in reasons if r] == reasons[-1:]
    assert len(reasons) == len(actions)  # it ended well: nothing to cancel
    assert request.state is RequestState.ENDED


interruptions: st.SearchStrategy[Event] = st.sampled_from(
    [
        FULL,
        FATAL,
        WorkerLost("p"),
        WorkerLost("d"),
        WorkerLost("x"),
        WorkerLeft("p"),
        WorkerLeft("d"),
        WorkerLeft("x"),
        ClientGone(),
        DeadlinePassed(),
        RouterEnds(),
    ]
)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), max_retries=st.integers(0, 3))
def test_a_request_goes_on_from_its_next_token_until_its_one_end(
    data: st.DataObject, max_retries: int
) -> None:
    num_tokens = data.draw(st.integers(1, 8))
    request = RequestLifecycle("r", max_retries)
    tokens: list[int] = []
    ends = retries = attempts = 0
    while request.state is not RequestState.ENDED:
        assert request.state is RequestState.WAITING
        if data.draw(st.integers(0, 9)) == 0:
            last: Event = data.draw(
                st.sampled_from(
                    [
                        NoWorkers("x"),
                        Shed(OverloadedError("x")),
                        ClientGone(),
                        DeadlinePassed(),
                        RouterEnds(),
                    ]
                )
            )
            actions = request.handle(last)
            assert (failure(actions) is None) == isinstance(last, ClientGone)
            assert request.state is RequestState.ENDED
            return
        request.handle(Placed("p", "d"))
        attempts += 1
        assert request.attempt_id == f"r#{attempts}"
        _, events = data.draw(histories(num_tokens, len(tokens), attempts))
        for interruption in data.draw(st.lists(interruptions, max_size=2)):
            events.insert(data.draw(st.integers(0, len(events))), interruption)
        for event in events:
            over = request.state in (RequestState.ENDED, RequestState.WAITING)
            if over and isinstance(event, FirstToken | TokenUpdate | AttemptFailed):
                continue  # of a former attempt: the dispatcher knows it by its id
            ended = request.state is RequestState.ENDED
            actions = request.handle(event)
            tokens += delivered(actions)
            retried = [action for action in actions if isinstance(action, Retry)]
            retries += bool(retried) and not isinstance(event, WorkerLeft)
            finished = any(isinstance(a, Deliver) and a.chunk.finish_reason for a in actions)
            gone = isinstance(event, ClientGone) and not ended
            ends += (failure(actions) is not None) + finished + gone
            if (retried or failure(actions) or gone) and not over:
                id_ = f"r#{attempts}"
                assert [a for a in actions if isinstance(a, CancelOn)] == [
                    CancelOn("p", id_),
                    CancelOn("d", id_),
                ]
    assert ends == 1
    assert retries <= max_retries
    assert tokens == request.token_ids == [*range(100, 100 + len(tokens))]
    assert len(tokens) <= num_tokens


EVENTS: list[Event] = [
    Placed("p", "d"),
    NoWorkers("none"),
    Shed(OverloadedError("later")),
    first(),
    update(1),
    FULL,
    WorkerLost("p"),
    WorkerLeft("p"),
    ClientGone(),
    DeadlinePassed(),
    RouterEnds(),
]


def in_state(state: RequestState) -> RequestLifecycle:
    request = placed(max_retries=3)
    events: dict[RequestState, list[Event]] = {
        RequestState.WAITING: [WorkerLost("d")],
        RequestState.PREFILLING: [],
        RequestState.DECODING: [first()],
        RequestState.ENDED: [ClientGone()],
    }
    for event in events[state]:
        request.handle(event)
    assert request.state is state
    return request


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", RequestState)
def test_every_event_in_every_state_is_in_the_table_or_rejected(
    state: RequestState, event: Event
) -> None:
    waiting = isinstance(event, Placed | NoWorkers | Shed)
    of_an_attempt = isinstance(event, FirstToken | TokenUpdate | AttemptFailed)
    impossible = (waiting and state is not RequestState.WAITING) or (
        of_an_attempt and state is RequestState.WAITING
    )
    request = in_state(state)
    assert (type(event) not in TRANSITIONS[state]) == impossible
    if impossible:
        with pytest.raises(ValueError, match=f"{type(event).__name__} while {state.name}"):
            request.handle(event)
        assert request.state is state
    else:
        actions = request.handle(event)
        assert actions == [] or state is not RequestState.ENDED


def test_decodes_tokens_wait_for_the_first() -> None:
    request = placed()
    assert request.handle(update(1)) == []
    assert request.handle(update(2, last=True)) == []
    assert request.handle(first()) == [
        Deliver(TokenChunk([100, 101, 102], "length", num_cached_tokens=0))
    ]


def with_logprobs(message: FirstToken | TokenUpdate) -> FirstToken | TokenUpdate:
    """The message of a request that asks for logprobs: that of token n is -n."""
    if isinstance(message, TokenUpdate):
        entries = [logprob_of(token_id) for token_id in message.token_ids]
        return message.model_copy(update={"logprobs": entries})
    told = {"logprobs": logprob_of(message.token_id), "prompt_logprobs": [None, logprob_of(5)]}
    return message.model_copy(update={**told, "num_cached_tokens": 32})


def logprob_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-token_id, rank=1, top=[])


def test_logprobs_come_with_their_tokens_once_and_the_prompts_with_the_first() -> None:
    request = placed(max_retries=1)
    messages = [update(1, 2), first(), first(), update(1, 3), update(2)]
    chunks = deliveries(request, messages)
    request.handle(WorkerLost("d"))
    request.handle(Placed("p", "d"))
    chunks += deliveries(request, [update(5, attempt=2), first(4, attempt=2)])
    assert [chunk.token_ids for chunk in chunks] == [[100, 101, 102], [103], [104, 105]]
    for chunk in chunks:
        assert chunk.logprobs == [logprob_of(token_id) for token_id in chunk.token_ids]
    assert [chunk.prompt_logprobs for chunk in chunks] == [[None, logprob_of(5)], None, None]
    assert [chunk.num_cached_tokens for chunk in chunks] == [32, None, None]


def deliveries(
    request: RequestLifecycle, messages: list[FirstToken | TokenUpdate]
) -> list[TokenChunk]:
    actions = [a for message in messages for a in request.handle(with_logprobs(message))]
    return [action.chunk for action in actions if isinstance(action, Deliver)]


def test_a_shorter_repetition_does_not_replace_what_waits() -> None:
    for events in permutations([update(1, 3, last=True), update(1), update(1, 2)]):
        request = placed()
        for event in events:
            assert request.handle(event) == []
        assert delivered(request.handle(first())) == [100, 101, 102, 103]
        assert request.state is RequestState.ENDED


def test_what_waited_for_a_lost_first_token_is_dropped_with_its_attempt() -> None:
    request = placed(max_retries=1)
    request.handle(update(1, 3))
    assert request.handle(WorkerLost("p")) == [*CANCELS, Retry("prefill_lost")]
    request.handle(Placed("q", "d"))
    assert delivered(request.handle(first(attempt=2))) == [100]


@pytest.mark.parametrize("events", [[], [first()], [update(1)], [update(1), update(2)]])
def test_prefill_is_needed_until_the_first_token_is_here_and_decode_has_taken_over(
    events: list[Event],
) -> None:
    request = placed()
    for event in events:
        request.handle(event)
    actions = request.handle(WorkerLost("p"))
    assert type(failure(actions)) is WorkerLostError
    assert actions[1:] == CANCELS


def test_prefill_is_not_needed_once_decode_has_taken_over() -> None:
    request = placed()
    request.handle(first())
    request.handle(update(1))
    assert request.handle(WorkerLost("p")) == []
    assert delivered(request.handle(update(2, last=True))) == [102]


def test_failures_use_the_retries_up_and_the_last_error_is_told() -> None:
    request = placed(max_retries=2)
    for reason in (WorkerLost("d"), FULL):
        request.handle(reason)
        request.handle(Placed("p", "d"))
    assert type(failure(request.handle(FULL))) is OverloadedError


def test_workers_that_leave_cost_no_retry() -> None:
    request = placed(max_retries=0)
    for attempt in range(1, 6):
        cancels = [CancelOn("p", f"r#{attempt}"), CancelOn("d", f"r#{attempt}")]
        assert request.handle(WorkerLeft("d")) == [*cancels, Retry("worker_left")]
        request.handle(Placed("p", "d"))


def test_a_worker_that_complains_is_kept_and_its_partner_avoided() -> None:
    request = placed(max_retries=9)
    request.handle(AttemptFailed("p", WorkerLostError("no answer")))
    assert request.avoid == {"d"}
    request.handle(Placed("p", "e"))
    request.handle(AttemptFailed("e", WorkerLostError("transfer failed")))
    assert request.avoid == {"d", "p"}


def test_waiting_in_vain_tells_what_was_lost_and_what_is_missing() -> None:
    request = placed(max_retries=1)
    request.handle(WorkerLost("d"))
    error = failure(request.handle(NoWorkers("no decode worker is serving")))
    assert type(error) is WorkerLostError
    assert str(error) == "decode worker d was lost, and then no decode worker is serving"


def test_a_request_that_never_started_tells_why() -> None:
    error = failure(RequestLifecycle("r").handle(NoWorkers("no decode worker is serving")))
    assert type(error) is UnavailableError
    assert str(error) == "no decode worker is serving"
    full = OverloadedError("full")
    assert RequestLifecycle("r").handle(Shed(full)) == [Fail(full)]


def test_what_will_fail_anywhere_is_not_tried_again() -> None:
    for event, kind in (
        (FATAL, InvalidRequestError),
        (DeadlinePassed(), DeadlineError),
        (RouterEnds(), UnavailableError),
    ):
        error = failure(placed(max_retries=9).handle(event))
        assert type(error) is kind


def test_a_client_that_leaves_gets_no_error() -> None:
    assert placed().handle(ClientGone()) == CANCELS
