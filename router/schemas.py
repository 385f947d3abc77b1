"""The bodies of requests: OpenAI's fields, and vLLM's extensions under vLLM's names.

Null means absent. Unknown fields are ignored, as by vLLM, but a known one that is not supported
and would change the answer is refused by name. Types are strict: "5" is no number. ``docs/api.md``
lists all fields.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from protocol.errors import InvalidRequestError
from protocol.messages import Priority
from router.chat_message import ChatMessage
from router.schema_base import Body, refuse
from router.structured_output import StructuredOptions
from router.tools import ToolOptions

MAX_SEQUENCES = 128  # of one request: prompts times the larger of n and best_of
MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_STOP_STRINGS = 4
MAX_STOP_TOKEN_IDS = 128

Prompt = str | list[int]
Bias = Annotated[float, Field(ge=-100, le=100)]

# Field: the values that ask for nothing beyond what is always done.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "max_completion_tokens": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}


def _prompts(value: object) -> list[Prompt]:
    """One prompt or several, each text or token ids, as a list of prompts."""
    prompts = [value] if isinstance(value, str) or _is_token_ids(value) else value
    if not isinstance(prompts, list) or not all(
        isinstance(prompt, str) or _is_token_ids(prompt) for prompt in prompts
    ):
        raise ValueError("must be a string, a list of token ids, or a list of either")
    if not all(prompts):
        raise ValueError("is empty")
    if len(prompts) > MAX_SEQUENCES:
        raise ValueError(f"has {len(prompts)} prompts, the limit is {MAX_SEQUENCES}")
    return prompts


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"has {len(stops)} strings, the limit is {MAX_STOP_STRINGS}")
    if "" in stops:
        raise ValueError("must not be an empty string")
    return stops


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False


class SamplingOptions(Body):
    """How tokens are chosen, and which end or show."""

    model: str | None = None
    stream: bool = False
    timeout: float | None = Field(None, gt=0)  # seconds, at most the router's own
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # -1 and 0 keep all
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = (
        Field(default_factory=list)
    )
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None  # default: text yes, rendered chats no
    logit_bias: dict[str, Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    cache_salt: str = Field("", max_length=256)  # KV is shared only under the same salt
    priority: Priority = 0


class GenerationBody(SamplingOptions, StructuredOptions):
    """What completions and chats take. The class variables are about their answers."""

    id_prefix: ClassVar[str]  # of an answer's id
    prompt_field: ClassVar[str]  # what the prompt is made of

    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    best_of: int | None = Field(None, ge=1, le=MAX_SEQUENCES)  # so many are made, n are shown
    max_tokens: int | None = Field(None, ge=1)
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        refuse(self.model_extra or {}, UNSUPPORTED)
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only allowed when stream is true"
            raise InvalidRequestError(message, "stream_options")
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError(f"best_of {self.best_of} is less than n {self.n}", "best_of")
        if self.stream and self.num_sequences > self.n:
            message = "best_of above n cannot be streamed: the best are known at the end"
            raise InvalidRequestError(message, "best_of")
        return self

    @property
    def num_sequences(self) -> int:
        """Sequences to generate for a prompt, of which the best ``n`` are shown."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to show for each token; None: no log probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_tokens"

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the client says."""
        return self.max_tokens


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    id_prefix = "cmpl-"
    prompt_field = "prompt"

    prompt: Annotated[
        list[Prompt], BeforeValidator(_prompts, json_schema_input_type=Prompt | list[Prompt])
    ]
    max_tokens: int | None = Field(None, ge=0)  # 0 only with echo
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens 0 is only allowed with echo", "max_tokens")
        width = self.num_sequences
        if len(self.prompt) * width > MAX_SEQUENCES:
            param = "n" if width == self.n else "best_of"
            message = (
                f"{param} {width} for {len(self.prompt)} prompts: {MAX_SEQUENCES} is the limit"
            )
            raise InvalidRequestError(message, param)
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to show for each token; None: no log probabilities."""
        return self.logprobs


class ChatOptions(ToolOptions):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class ChatBody(ChatOptions, GenerationBody):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    prompt_field = "messages"

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # wins over max_tokens
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        asked = self.grammar()
        if asked is not None and self.offered_tools:
            message = f"{asked[1]} cannot be combined with tools, unless tool_choice is none"
            raise InvalidRequestError(message, asked[1])
        return self

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs true", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to show for each token; None: no log probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the client says."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeBody(ChatOptions):
    """POST /tokenize: a text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None  # default: text yes, rendered chats no

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
