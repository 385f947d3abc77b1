"""What routers are told of new tokens. ``account``: where the time before went, seconds a stage."""

from __future__ import annotations

from decode.scheduler import NewToken
from protocol.messages import FirstToken, TokenUpdate
from protocol.sampling import TokenLogprobs


def first_token(
    new: NewToken, logprobs: TokenLogprobs | None, account: dict[str, float]
) -> FirstToken:
    """After a prompt that decode computed itself."""
    return FirstToken(
        request_id=new.sequence.request_id,
        index=new.sequence.num_output_tokens - 1,
        token_id=new.token_id,
        finish_reason=new.finish_reason,
        num_cached_tokens=new.sequence.num_cached,
        logprobs=logprobs,
        prompt_logprobs=new.sequence.all_prompt_logprobs(),
        account=account,
    )


def update(new: NewToken, logprobs: TokenLogprobs | None, account: dict[str, float]) -> TokenUpdate:
    """After another token."""
    return TokenUpdate(
        request_id=new.sequence.request_id,
        index=new.sequence.num_output_tokens - 1,
        token_ids=[new.token_id],
        finish_reason=new.finish_reason,
        logprobs=None if logprobs is None else [logprobs],
        account=account,
    )
