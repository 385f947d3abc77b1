"""A message's form on the wire: two frames, its class's name and a msgpack map.

Unknown names, malformed maps and frames over ``MAX_FRAME_BYTES`` raise ProtocolError; receivers
count and drop them.
"""

from __future__ import annotations

import msgpack
from pydantic import ValidationError

from protocol.errors import ProtocolError
from protocol.messages import (
    Accepted,
    CacheChanges,
    Cancel,
    ChangeRole,
    Drain,
    FirstToken,
    GenerateRequest,
    Grant,
    GrantRefused,
    GrantRequest,
    Handoff,
    Heartbeat,
    Leaving,
    Left,
    Message,
    PrefillRequest,
    Register,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    RequestFailed,
    Revoke,
    RouterHeartbeat,
    SendCache,
    Tokens,
)

MAX_FRAME_BYTES = 64 << 20

_KINDS: dict[bytes, type[Message]] = {
    cls.__name__.encode(): cls
    for cls in (
        Register,
        Registered,
        RegistrationRefused,
        RegisterAgain,
        RouterHeartbeat,
        Heartbeat,
        Leaving,
        Left,
        Drain,
        ChangeRole,
        PrefillRequest,
        GenerateRequest,
        FirstToken,
        Tokens,
        RequestFailed,
        Cancel,
        CacheChanges,
        SendCache,
        GrantRequest,
        Grant,
        GrantRefused,
        Handoff,
        Accepted,
        Revoke,
    )
}


def encode(message: Message) -> list[bytes]:
    """The message's two frames."""
    return [type(message).__name__.encode(), msgpack.packb(message.model_dump())]


def decode(frames: list[bytes]) -> Message:
    """Rebuild a message. Raises ProtocolError on anything that ``encode`` did not make."""
    if len(frames) != 2:
        raise ProtocolError(f"a message has 2 frames, not {len(frames)}")
    kind, payload = frames
    message_class = _KINDS.get(kind)
    if message_class is None:
        raise ProtocolError(f"unknown message {kind[:32]!r}")
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"{kind.decode()} of {len(payload)} bytes, limit {MAX_FRAME_BYTES}")
    try:
        return message_class.model_validate(msgpack.unpackb(payload))
    except (ValidationError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed {kind.decode()}: {error}") from error
