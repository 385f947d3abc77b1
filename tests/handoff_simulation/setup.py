"""The sizes of the simulated workers, and one request as its client sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtransfer.config import TransferConfig
from protocol.errors import KvferryError
from protocol.geometry import Fingerprint, KVGeometry
from protocol.sampling import SamplingParams
from router.lifecycle import RequestLifecycle, RequestState
from tests.fake_model import generate

PREFILL, DECODE = "prefill-0", "decode-0"
EPOCH = 7
GEOMETRY = KVGeometry(num_kv_heads=1, num_layers=1, block_size=4, head_dim=4, dtype="float32")
FINGERPRINT = Fingerprint(weights_digest="00", rope="none", geometry=GEOMETRY)


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes of the two workers. Blocks hold ``GEOMETRY.block_size`` tokens."""

    prefill_blocks: int = 32
    decode_blocks: int = 32
    tier_blocks: int = 0  # that a tier below decode's pool keeps
    max_num_batched_tokens: int = 8
    max_num_seqs: int = 4
    ask_ahead: int = 8
    prefill_fingerprint: Fingerprint = FINGERPRINT
    transfer: TransferConfig = field(default_factory=TransferConfig)  # of both workers
    alone: float = 0.0  # share of the attempts that decode serves without prefill


@dataclass(slots=True, eq=False)
class Request:
    """One request as its client sees it."""

    prompt: list[int]
    sampling: SamplingParams
    lifecycle: RequestLifecycle
    deadline: float
    epoch: int  # of the decode worker, as the router knows it
    tokens: list[int] = field(default_factory=list)
    errors: list[KvferryError] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    num_attempts: int = 0


def outcome(request: Request) -> str:
    """How a request ended; asserts that it ended once and with the right tokens."""
    expected = generate(request.prompt, request.sampling)
    assert request.lifecycle.state is RequestState.ENDED
    assert request.tokens == expected[: len(request.tokens)]
    ends = [error.code for error in request.errors]
    if request.finish_reason is not None:
        assert request.tokens == expected
        ends.append("finished")
    if request.cancelled:
        ends.append("cancelled")
    assert len(ends) == 1, ends
    return ends[0]
