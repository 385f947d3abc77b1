"""Every error kvferry raises on purpose.

    KvferryError
    ├── InvalidRequestError     400  the client must change the request
    │   ├── ContextLengthError  400  prompt and max_tokens exceed a limit; says both numbers
    │   ├── ModelNotFoundError  404  the model named is not served here
    │   ├── RequestNotFoundError 404 no such request is on record
    │   └── WorkerNotFoundError 404  no such worker is registered
    ├── RoleChangeRefusedError  409  the pools as they are do not allow the change
    ├── OverloadedError         429  try again later; carries ``retry_after`` seconds
    ├── UnavailableError        503  no worker can take the request now
    ├── WorkerLostError         502  a worker died or stopped answering mid-request
    ├── DeadlineError           504  a deadline passed
    ├── IntegrityError          500  KV failed verification; never served
    ├── ProtocolError           500  a peer sent what the protocol does not allow
    └── ConfigError             -    the process cannot start with this configuration

An error that crosses a process boundary travels as ``code`` and ``message`` and is rebuilt by
``error_from_code``.
"""

from __future__ import annotations

from typing import ClassVar


class KvferryError(Exception):
    """Base of the tree. ``status`` is the HTTP status, ``code`` the stable name on the wire."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False


class InvalidRequestError(KvferryError):
    """The client must change the request. ``param`` names the offending field, if one does."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The request exceeds a length limit; the message says the size and the limit."""

    code = "context_length_exceeded"


class ModelNotFoundError(InvalidRequestError):
    """The model named in the request is not served here."""

    status = 404
    code = "model_not_found"


class RequestNotFoundError(InvalidRequestError):
    """The request that was asked about is not on record (any more)."""

    status = 404
    code = "request_not_found"


class WorkerNotFoundError(InvalidRequestError):
    """The worker named in the request is not registered."""

    status = 404
    code = "worker_not_found"


class RoleChangeRefusedError(KvferryError):
    """A worker cannot change its role now; the message says why."""

    status = 409
    code = "role_change_refused"


class OverloadedError(KvferryError):
    """Too much work is queued. ``retry_after`` is in seconds."""

    status = 429
    code = "overloaded"
    retryable = True

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(KvferryError):
    """No worker can take the request at present."""

    status = 503
    code = "unavailable"
    retryable = True


class WorkerLostError(KvferryError):
    """A worker that held the request died or stopped answering."""

    status = 502
    code = "worker_lost"
    retryable = True


class DeadlineError(KvferryError):
    """The request's deadline passed."""

    status = 504
    code = "deadline_exceeded"


class IntegrityError(KvferryError):
    """KV did not verify: a digest, an epoch or a block count was wrong."""

    code = "kv_integrity"
    retryable = True


class ProtocolError(KvferryError):
    """A peer sent something the protocol does not allow."""

    code = "protocol_error"


class ConfigError(KvferryError):
    """The process cannot start with this configuration; the message says what to change."""

    code = "config_error"


_BY_CODE: dict[str, type[KvferryError]] = {
    cls.code: cls
    for cls in (
        KvferryError,
        InvalidRequestError,
        ContextLengthError,
        ModelNotFoundError,
        RequestNotFoundError,
        WorkerNotFoundError,
        RoleChangeRefusedError,
        OverloadedError,
        UnavailableError,
        WorkerLostError,
        DeadlineError,
        IntegrityError,
        ProtocolError,
    )
}


def error_from_code(code: str, message: str) -> KvferryError:
    """Rebuild the error that a peer reported; an unknown code becomes the base class."""
    return _BY_CODE.get(code, KvferryError)(message)
