"""Every control message, and who sends it to whom.

    worker → router   Register, Heartbeat, Leaving, Left, FirstToken, Tokens, RequestFailed,
                      CacheChanges
    router → worker   Registered, RegistrationRefused, RegisterAgain, RouterHeartbeat, Drain,
                      ChangeRole, PrefillRequest, GenerateRequest, Cancel, SendCache
    prefill → decode  GrantRequest, Handoff, Revoke
    decode → prefill  Grant, GrantRefused, Accepted

Token ids travel as little-endian uint32 bytes; ``protocol.wire`` has the rest of the format.

A ``request_id`` names one attempt at a client's request: the router numbers the attempts, so that
what a former one still says is not taken for the current one's.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from protocol.geometry import Fingerprint
from protocol.hashing import KEY_BYTES, token_bytes, tokens_from_bytes
from protocol.sampling import SamplingParams, TokenLogprobs

Role = Literal["prefill", "decode"]
FinishReason = Literal["stop", "length"]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # the lower, the earlier


def _read_tokens(value: object) -> object:
    if isinstance(value, bytes):
        if len(value) % 4:
            raise ValueError("token ids are not a whole number of uint32")
        return tokens_from_bytes(value)
    return value


TokenIds = Annotated[list[int], BeforeValidator(_read_tokens), PlainSerializer(token_bytes)]


class Message(BaseModel):
    """Base of all messages: frozen, every field typed, nothing unknown accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StepSums(Message):
    """Sums over a worker's steps of one kind, older ones forgotten, for ``engine.step_sums``.

    x is the work of a step, or of several that are told as one, three numbers, and y its seconds,
    both divided by a scale.
    """

    count: float = 0.0  # steps
    products: tuple[float, ...] = (0.0,) * 6  # of x·xᵀ, the upper triangle row by row
    totals: tuple[float, ...] = (0.0,) * 3  # of x·y
    squares: float = 0.0  # of y·y


class WorkerLoad(Message):
    """What a worker tells of its load with each heartbeat."""

    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0  # tokens of a step
    num_promised: int = 0  # decode: sequences that were granted or wait for it, and have not ended
    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0  # prompt tokens not computed yet
    prefill_tokens_per_second: float = 0.0  # measured while computing; 0: not yet
    free_blocks: int = 0
    total_blocks: int = 0
    open_grants: int = 0
    open_leases: int = 0
    prefill_steps: StepSums = StepSums()  # of prompt chunks alone
    decode_steps: StepSums = StepSums()  # of decode rows alone


class PeerAddress(Message):
    """Where and who a decode worker is, as the router tells prefill."""

    worker_id: str
    epoch: int  # the worker's incarnation
    control: str  # ZMQ endpoint
    data: bytes  # the transport's own address


class Register(Message):
    """A worker joins (again). Its epoch is new at every start of its process and in every role.

    ``session`` counts how often it has dropped all of this router's work: a registration of the
    same epoch and session changes nothing.
    """

    worker_id: str
    epoch: int
    session: int
    role: Role
    model: str
    fingerprint: Fingerprint
    vocab_size: int
    max_model_len: int
    pid: int
    host: str
    control: str
    data: bytes
    transport: str
    metrics: str
    load: WorkerLoad


class Registered(Message):
    """The router took the worker in. ``heartbeat_interval`` is in seconds.

    What follows is of the ``session`` that it names; a worker that has begun another ignores it.
    """

    router_id: str
    session: int
    heartbeat_interval: float


class RegistrationRefused(Message):
    """The router does not take the worker in; it may try again."""

    reason: str


class RegisterAgain(Message):
    """The router does not know the sender of a heartbeat: the worker drops this router's work.

    The router was restarted, or took the worker for lost.
    """


class RouterHeartbeat(Message):
    """The router is alive. A worker that hears nothing drops the router's work.

    So does one that has not received ``num_sent`` messages about requests since it registered.
    """

    num_sent: int


class Heartbeat(Message):
    """A registered worker is alive.

    One that has sent more messages about requests since it registered than the router has
    received is lost, and registers again. ``load`` includes what the first ``num_received`` of
    the router's have brought: others may be on their way.
    """

    epoch: int
    load: WorkerLoad
    num_sent: int
    num_received: int


class Leaving(Message):
    """The worker takes no new work and ends what it has; it may come back in ``next_role``."""

    next_role: Role | None = None


class Left(Message):
    """The worker ends, or its role does; what it still has must go on elsewhere."""

    next_role: Role | None = None


class Drain(Message):
    """The router asks the worker to leave, as SIGTERM does."""


class ChangeRole(Message):
    """The router asks the worker to end its work and come back in ``role``, under a new epoch.

    Idempotent: another epoch's is ignored.
    """

    epoch: int  # of the worker that is meant
    role: Role


def _check_keys(value: bytes) -> bytes:
    if len(value) % KEY_BYTES:
        raise ValueError(f"block keys are not a multiple of {KEY_BYTES} bytes")
    return value


BlockKeys = Annotated[bytes, AfterValidator(_check_keys)]


class CacheChanges(Message):
    """Which KV blocks of a worker have become findable, and which no longer are.

    Numbered from 0 in every session; at 0 the worker begins anew: what it told before is void.
    Blocks go by ``protocol.hashing.block_key``. Not counted among messages about requests: a
    router that misses one asks for all.
    """

    number: Annotated[int, Field(ge=0)]
    stored: BlockKeys
    evicted: BlockKeys


class SendCache(Message):
    """The router has missed a CacheChanges: begin anew."""


class Continuation(Message):
    """A client's prompt, followed by the output that former attempts generated."""

    request_id: str
    token_ids: TokenIds
    num_prompt_tokens: int  # the rest of ``token_ids`` is output
    sampling: SamplingParams
    cache_salt: str = ""  # KV blocks are shared only among requests with the same salt
    priority: Priority = 0
    timeout: float  # seconds from now

    @model_validator(mode="after")
    def _leaves_something_to_do(self) -> Self:
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if not 0 <= num_output < self.sampling.max_tokens:
            raise ValueError(
                f"{len(self.token_ids)} tokens with a prompt of {self.num_prompt_tokens} and at "
                f"most {self.sampling.max_tokens} of output"
            )
        return self


class PrefillRequest(Continuation):
    """Compute the tokens' KV, sample the next one, hand off to ``decode``."""

    decode: PeerAddress


class GenerateRequest(Continuation):
    """To decode: compute the tokens' KV as well, and generate. Nothing is handed off."""


Account = dict[str, Annotated[float, Field(ge=0)]]  # what a worker did just before: seconds of each


class FirstToken(Message):
    """Token ``index`` of a request's output, by the worker that computed its prompt.

    With a finish reason it is the last one, and nothing is handed off.
    """

    request_id: str
    index: int
    token_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int  # prompt tokens that the worker found in its cache
    logprobs: TokenLogprobs | None = None  # of this token, if the request asks
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of the prompt's; the first: None
    account: Account = {}


class TokenUpdate(Message):
    """Tokens [index, index + len(token_ids)) of one request's output."""

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one a token, if the request asks
    account: Account = {}  # with decode's first token only


class Tokens(Message):
    """One decode step's new tokens for one router."""

    updates: list[TokenUpdate]


class RequestFailed(Message):
    """The worker gave the request up; ``code`` and ``message`` rebuild the error."""

    request_id: str
    code: str
    message: str


class Cancel(Message):
    """Stop and forget a request. Idempotent; unknown requests are ignored."""

    request_id: str


class GrantRequest(Continuation):
    """Prefill asks decode to reserve blocks for the tokens before computing them."""

    router_id: str  # where decode sends the new tokens
    epoch: int  # of the decode worker that prefill means to ask
    fingerprint: Fingerprint


class Grant(Message):
    """Decode reserved ``blocks``, destinations of the prompt's blocks that it lacks, in order."""

    request_id: str
    grant_id: Annotated[int, Field(ge=1, lt=2**32)]
    epoch: int
    num_cached_tokens: Annotated[int, Field(ge=0)]  # of whole blocks that decode already holds
    blocks: list[Annotated[int, Field(ge=0)]]
    expires_in: float  # seconds without any block received


class GrantRefused(Message):
    """Decode cannot take the request, now or ever."""

    request_id: str
    code: str
    message: str


class Handoff(Message):
    """All blocks under the grant are sent; with their digests and the first token."""

    request_id: str
    grant_id: int
    epoch: int
    first_token: Annotated[int, Field(ge=0, lt=2**32)]
    num_tokens: int  # tokens whose KV the blocks hold
    digests: list[int]  # one per granted block, unsigned 64 bit


class Accepted(Message):
    """Decode verified the hand-off and owns the request: prefill's lease ends."""

    request_id: str
    grant_id: int


class Revoke(Message):
    """Prefill will not use its grant for the request, be it open, waiting or none."""

    request_id: str
