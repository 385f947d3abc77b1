"""What crosses a process boundary: every message there and back, and everything that is not one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol import errors, messages, wire
from protocol.errors import KvferryError, ProtocolError, error_from_code
from protocol.geometry import Fingerprint, KVGeometry
from protocol.hashing import HASH_BYTES, hash_block, token_bytes, tokens_from_bytes
from protocol.messages import Message, PrefillRequest
from protocol.sampling import Grammar, SamplingParams, TokenLogprobs
from protocol.wire import decode, encode

uint32 = st.integers(0, 2**32 - 1)
token_ids = st.lists(uint32, max_size=20)
names = st.text(max_size=8)
counts = st.integers(0, 2**40)
seconds = st.floats(0, 1e6)
reasons = st.sampled_from([None, "stop", "length"])
geometries = st.builds(
    KVGeometry,
    num_kv_heads=st.integers(1, 64),
    num_layers=st.integers(1, 128),
    block_size=st.sampled_from([16, 64]),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
fingerprints = st.builds(Fingerprint, weights_digest=names, rope=names, geometry=geometries)
grammars = st.builds(Grammar, kind=st.sampled_from(["json_schema", "regex", "lark"]), text=names)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 2),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(uint32, min_size=1, max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(uint32, st.floats(-100, 100)), max_size=2).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | grammars,
)
logprobs = st.builds(
    TokenLogprobs,
    logprob=st.floats(-100, 0),
    rank=counts,
    top=st.lists(st.tuples(uint32, st.floats(-100, 0)), max_size=2),
)
loads = st.builds(messages.WorkerLoad, num_running=counts, free_blocks=counts)
peers = st.builds(
    messages.PeerAddress, worker_id=names, epoch=counts, control=names, data=st.binary(max_size=9)
)
updates = st.builds(
    messages.TokenUpdate,
    request_id=names,
    index=counts,
    token_ids=token_ids,
    finish_reason=reasons,
    logprobs=st.none() | st.lists(logprobs, max_size=2),
)

keys = st.lists(st.binary(min_size=8, max_size=8)).map(b"".join)


@st.composite
def continuations(
    draw: st.DrawFn, kind: type[messages.Continuation], **fields: st.SearchStrategy[Any]
) -> Message:
    """A prompt with less than ``max_tokens`` of output after it."""
    tokens, params = draw(token_ids), draw(sampling)
    least = max(0, len(tokens) - params.max_tokens + 1)
    return kind(
        request_id=draw(names),
        token_ids=tokens,
        num_prompt_tokens=draw(st.integers(least, len(tokens))),
        sampling=params,
        timeout=draw(seconds),
        **{name: draw(strategy) for name, strategy in fields.items()},
    )


roles = st.sampled_from([None, "prefill", "decode"])

STRATEGIES: dict[type[Message], st.SearchStrategy[Message]] = {
    messages.Register: st.builds(
        messages.Register,
        epoch=counts,
        session=counts,
        pid=counts,
        vocab_size=counts,
        max_model_len=counts,
        fingerprint=fingerprints,
        load=loads,
    ),
    messages.Registered: st.builds(messages.Registered, heartbeat_interval=seconds),
    messages.RegistrationRefused: st.builds(messages.RegistrationRefused),
    messages.RegisterAgain: st.builds(messages.RegisterAgain),
    messages.RouterHeartbeat: st.builds(messages.RouterHeartbeat, num_sent=counts),
    messages.Heartbeat: st.builds(messages.Heartbeat, epoch=counts, load=loads, num_sent=counts),
    messages.Leaving: st.builds(messages.Leaving, next_role=roles),
    messages.Left: st.builds(messages.Left, next_role=roles),
    messages.Drain: st.builds(messages.Drain),
    messages.ChangeRole: st.builds(messages.ChangeRole, epoch=counts),
    messages.PrefillRequest: continuations(PrefillRequest, decode=peers),
    messages.GenerateRequest: continuations(messages.GenerateRequest),
    messages.FirstToken: st.builds(
        messages.FirstToken,
        index=counts,
        token_id=uint32,
        finish_reason=reasons,
        num_cached_tokens=counts,
    ),
    messages.Tokens: st.builds(messages.Tokens, updates=st.lists(updates, max_size=3)),
    messages.CacheChanges: st.builds(
        messages.CacheChanges, number=counts, stored=keys, evicted=keys
    ),
    messages.SendCache: st.builds(messages.SendCache),
    messages.RequestFailed: st.builds(messages.RequestFailed),
    messages.Cancel: st.builds(messages.Cancel),
    messages.GrantRequest: continuations(
        messages.GrantRequest, router_id=names, epoch=counts, fingerprint=fingerprints
    ),
    messages.Grant: st.builds(
        messages.Grant,
        grant_id=st.integers(1, 2**32 - 1),
        epoch=counts,
        num_cached_tokens=counts,
        blocks=st.lists(counts, max_size=9),
        expires_in=seconds,
    ),
    messages.GrantRefused: st.builds(messages.GrantRefused),
    messages.Handoff: st.builds(
        messages.Handoff,
        grant_id=uint32,
        epoch=counts,
        first_token=uint32,
        num_tokens=counts,
        digests=st.lists(st.integers(0, 2**64 - 1), max_size=9),
    ),
    messages.Accepted: st.builds(messages.Accepted, grant_id=uint32),
    messages.Revoke: st.builds(messages.Revoke),
}


def test_every_kind_of_message_is_covered() -> None:
    assert set(wire._KINDS.values()) == STRATEGIES.keys()


@settings(max_examples=120, deadline=None)
@given(message=st.one_of(list(STRATEGIES.values())))
def test_there_and_back(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from([*wire._KINDS, b"", b"Message", b"\xff\xfe"]),
    payload=st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.none(), st.integers(-9, 2**64 - 1), st.text(max_size=5), st.binary()),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner),
            max_leaves=6,
        ).map(msgpack.packb),
    ),
)
def test_noise_is_a_protocol_error_and_nothing_else(kind: bytes, payload: bytes) -> None:
    try:
        message = decode([kind, payload])
    except ProtocolError:
        return
    assert isinstance(message, wire._KINDS[kind])


@settings(max_examples=120, deadline=None)
@given(message=st.one_of(list(STRATEGIES.values())), data=st.data())
def test_a_damaged_message_is_a_protocol_error_or_another_message(
    message: Message, data: st.DataObject
) -> None:
    kind, payload = encode(message)
    damaged = bytearray(payload)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    for frame in (bytes(damaged), payload[: data.draw(st.integers(0, len(payload) - 1))]):
        with suppress(ProtocolError):
            decode([kind, frame])


CANCEL = encode(messages.Cancel(request_id="r"))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        CANCEL[:1],
        [*CANCEL, b""],
        [b"Cancel", CANCEL[1] + b"x"],
        [b"Cancel", msgpack.packb({})],
        [b"Cancel", msgpack.packb({"request_id": 1})],
        [b"Cancel", msgpack.packb({"request_id": "r", "more": 1})],
        [b"Cancel", msgpack.packb(["r"])],
        [b"Cancel", b"\xc1"],
        [b"Cancel", b"\x91" * 100_000],
        [b"Cancel", b"\xdf\xff\xff\xff\xff"],
        [b"WorkerLoad", msgpack.packb({})],
        [b"__class__", CANCEL[1]],
    ],
)
def test_malformed_frames(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


def test_a_frame_over_the_limit_is_not_even_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", len(CANCEL[1]))
    assert decode(CANCEL) == messages.Cancel(request_id="r")
    with pytest.raises(ProtocolError, match="limit"):
        decode(encode(messages.Cancel(request_id="rr")))


def test_token_ids_that_are_not_whole_are_refused() -> None:
    prompt = {**_prefill_request([1]).model_dump(), "token_ids": b"12345"}
    with pytest.raises(ProtocolError, match="uint32"):
        decode([b"PrefillRequest", msgpack.packb(prompt)])


@pytest.mark.parametrize("num_prompt_tokens", [4, 2, -1])
def test_a_request_with_nothing_to_generate_is_refused(num_prompt_tokens: int) -> None:
    message = {**_prefill_request([1, 2, 3]).model_dump(), "num_prompt_tokens": num_prompt_tokens}
    with pytest.raises(ProtocolError, match=f"prompt of {num_prompt_tokens}"):
        decode([b"PrefillRequest", msgpack.packb(message)])


def test_token_ids_travel_as_four_bytes_each() -> None:
    long = _prefill_request([2**32 - 1] * 1000)
    assert len(encode(long)[1]) - len(encode(_prefill_request([]))[1]) < 4010
    assert token_bytes([1, 70000]) == b"\x01\0\0\0\x70\x11\x01\0"
    assert tokens_from_bytes(token_bytes([0, 2**32 - 1])) == [0, 2**32 - 1]


def _prefill_request(token_ids: list[int]) -> PrefillRequest:
    return PrefillRequest(
        request_id="r",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=1),
        decode=messages.PeerAddress(worker_id="d", epoch=1, control="c", data=b""),
        timeout=1.0,
    )


def test_messages_are_frozen() -> None:
    with pytest.raises(ValidationError):
        messages.Cancel(request_id="r").request_id = "s"


# Names, shapes, errors -----------------------------------------------------------------------


@settings(deadline=None)
@given(a=st.lists(uint32, min_size=4, max_size=4), b=st.lists(uint32, min_size=4, max_size=4))
def test_a_blocks_name_depends_on_tokens_predecessor_and_salt(a: list[int], b: list[int]) -> None:
    name = hash_block(b"", a, b"s")
    assert len(name) == HASH_BYTES
    assert (hash_block(b"", b, b"s") == name) == (a == b)
    assert hash_block(name, a, b"s") != name
    assert hash_block(b"", a, b"t") != name


def test_a_salt_is_never_cut() -> None:
    common = b"x" * 63
    assert hash_block(b"", [1], common + b"a") != hash_block(b"", [1], common + b"b")
    with pytest.raises(ValueError, match="64"):
        hash_block(b"", [1], b"x" * 65)


@given(geometry=geometries, num_tokens=st.integers(0, 10**6))
def test_geometry(geometry: KVGeometry, num_tokens: int) -> None:
    elements = 1
    for size in geometry.row_shape:
        elements *= size
    assert geometry.row_bytes == elements * (4 if geometry.dtype == "float32" else 2)
    blocks = geometry.blocks_for(num_tokens)
    assert blocks * geometry.block_size >= num_tokens
    assert max(0, blocks - 1) * geometry.block_size <= num_tokens
    assert (blocks == 0) == (num_tokens == 0)


@given(fingerprint=fingerprints, other=fingerprints)
def test_fingerprints_name_what_differs(fingerprint: Fingerprint, other: Fingerprint) -> None:
    difference = fingerprint.difference(other)
    assert (difference is None) == (fingerprint == other)
    assert fingerprint.difference(fingerprint.model_copy(deep=True)) is None


@pytest.mark.parametrize(
    "field",
    ["protocol_version", "weights_digest", "rope", "wire_quantization", *KVGeometry.model_fields],
)
def test_every_field_of_a_fingerprint_counts(field: str) -> None:
    geometry = KVGeometry(num_kv_heads=1, num_layers=2, block_size=4, head_dim=8, dtype="float32")
    mine = Fingerprint(weights_digest="00", rope="r", geometry=geometry)
    if field in KVGeometry.model_fields:
        changed = geometry.model_copy(update={field: "float16" if field == "dtype" else 99})
        theirs = mine.model_copy(update={"geometry": changed})
    else:
        theirs = mine.model_copy(update={field: 99 if field == "protocol_version" else "99"})
    difference = mine.difference(theirs)
    assert difference is not None
    assert field in difference
    assert difference.endswith(("99 there", "'99' there", "'float16' there"))


TREE = [
    cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, KvferryError)
]


@pytest.mark.parametrize("cls", TREE)
def test_errors_survive_the_wire_and_are_drawn_in_the_tree(cls: type[KvferryError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__
    if cls is errors.ConfigError:
        return  # ends its process before there is a wire
    rebuilt = error_from_code(cls.code, "why")
    assert type(rebuilt) is cls
    assert str(rebuilt) == "why"
    if cls is not KvferryError:
        assert f"{cls.status}  " in errors.__doc__


def test_codes_are_unique_and_unknown_ones_become_the_base() -> None:
    codes = [cls.code for cls in TREE]
    assert len(codes) == len(set(codes))
    assert type(error_from_code("from the future", "why")) is KvferryError
