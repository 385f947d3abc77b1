"""From a body to a ``Job``: prompts become token ids, options become ``SamplingParams``."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

from protocol.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from protocol.grammar import check
from protocol.sampling import Grammar, SamplingParams
from router.answers import AnswerHead, ChatShape, CompletionShape
from router.chat_message import ChatMessage
from router.generation import GenerationRequest, Generator
from router.output import Echo, Output
from router.reasoning import ReasoningParser
from router.schemas import (
    ChatBody,
    ChatOptions,
    CompletionBody,
    GenerationBody,
    Prompt,
    TokenizeBody,
)
from router.stream import Choice, Job
from router.text import TextModel
from router.timeline import Timeline
from router.token_bytes import TokenBytes
from router.tool_calls import ToolCallParser
from router.tools import call_grammar

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context
MANY_MESSAGES = 100  # more are rendered in a thread


class Intake:
    """Validates requests for one served model. Everything wrong raises InvalidRequestError."""

    def __init__(self, served_model_name: str, text: TextModel, generator: Generator) -> None:
        self._served_model_name = served_model_name
        self._text = text
        self._generator = generator
        self._token_bytes = TokenBytes(text.tokenizer)
        form = text.tool_format
        self._opening_token_id = None if form is None else text.special_token_id(form.opening)

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError unless the model is served; None means whichever is."""
        if name is not None and name != self._served_model_name:
            message = f"the model {name!r} does not exist; this is {self._served_model_name!r}"
            raise ModelNotFoundError(message, "model")

    async def completion(self, body: CompletionBody, received: float) -> Job:
        """The job of a completion request whose first byte came at ``received`` (monotonic)."""
        read = time.monotonic()
        self.check_model(body.model)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [await self._prompt_ids(prompt, special) for prompt in body.prompt]
        return await self._job(body, prompts, partial(Timeline.begun, received, read))

    async def chat(self, body: ChatBody, received: float) -> Job:
        """The job of a chat request whose first byte came at ``received`` (monotonic)."""
        read = time.monotonic()
        self.check_model(body.model)
        prompt = await self._chat_ids(body.messages, body, bool(body.add_special_tokens))
        return await self._job(body, [prompt], partial(Timeline.begun, received, read))

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Token ids of a text or of a chat, as the other two count them."""
        self.check_model(body.model)
        if body.messages is not None:
            return await self._chat_ids(body.messages, body, bool(body.add_special_tokens))
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return await self._text.encode(body.prompt or "", add_special_tokens=special)

    async def _chat_ids(
        self, messages: Sequence[ChatMessage], options: ChatOptions, add_special_tokens: bool
    ) -> list[int]:
        """The template itself writes special tokens such as BOS: none are added by default."""
        render = partial(
            self._text.render_chat,
            [message.for_template() for message in messages],
            tools=options.tools_for_template(),
            add_generation_prompt=options.add_generation_prompt,
            variables=options.chat_template_kwargs,
        )
        many = len(messages) > MANY_MESSAGES
        text = await asyncio.to_thread(render) if many else render()
        return await self._text.encode(text, add_special_tokens=add_special_tokens)

    async def _prompt_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            return await self._text.encode(prompt, add_special_tokens=add_special_tokens)
        self._text.check_token_ids(prompt, "prompt")
        return prompt

    async def _job(
        self, body: GenerationBody, prompts: Sequence[list[int]], timeline: Callable[[], Timeline]
    ) -> Job:
        chat = isinstance(body, ChatBody)
        answer_id = f"{body.id_prefix}{secrets.token_hex(16)}"
        names = None if body.num_logprobs is None else self._token_bytes
        self._text.check_token_ids(body.stop_token_ids, "stop_token_ids")
        thinking = chat and any(map(self._text.is_thinking, prompts))
        grammar = await self._grammar(body, thinking=thinking)
        choices: list[Choice] = []
        for prompt in prompts:
            max_tokens = self._max_tokens(body, len(prompt))
            sampling = self._sampling(body, max_tokens, grammar)
            echo = await self._echo(body, prompt)
            seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
            for sequence in range(body.num_sequences):
                request = GenerationRequest(
                    request_id=f"{answer_id}-{len(choices)}",
                    prompt_token_ids=prompt,
                    sampling=sampling.model_copy(update={"seed": _seed(seed, sequence)}),
                    timeout=body.timeout,
                    cache_salt=body.cache_salt,
                    priority=body.priority,
                    timeline=timeline(),
                )
                choices.append(Choice(request, self._output(body, len(choices), prompt, echo)))
        return Job(
            head=AnswerHead(answer_id, self._served_model_name, self._text.fingerprint),
            shape=ChatShape(names) if chat else CompletionShape(names),
            choices=choices,
            num_sequences=body.num_sequences,
            num_shown=body.n,
            stream=body.stream,
            include_usage=body.include_usage,
            return_token_ids=body.return_token_ids,
        )

    async def _grammar(self, body: GenerationBody, *, thinking: bool) -> Grammar | None:
        """What the output must be, checked in a thread: a large schema takes its time."""
        asked = self._call_grammar(body) or body.grammar()
        if asked is None:
            return None
        grammar, field = asked
        if body.ignore_eos:
            message = f"ignore_eos cannot be combined with {field}, whose output has an end"
            raise InvalidRequestError(message, "ignore_eos")
        if thinking:
            message = f"{field}: the prompt ends inside <think>, and thoughts have no such form"
            raise InvalidRequestError(message, field)
        if not (self._text.eos_token_ids or body.stop_token_ids):
            message = f"{field} needs stop_token_ids: this model has no end-of-text token"
            raise InvalidRequestError(message, field)
        try:
            await asyncio.to_thread(check, grammar)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{field}: {error}", field) from error
        return grammar

    def _call_grammar(self, body: GenerationBody) -> tuple[Grammar, str] | None:
        """What the calls that must be made look like, and the field that says so."""
        if not isinstance(body, ChatBody) or not body.offered_tools:
            return None
        form = self._text.tool_format
        if form is None:
            message = "tools: it is not known how this model calls them: see --tool-call-parser"
            raise InvalidRequestError(message, "tools")
        if not body.required_tools:
            return None
        grammar = call_grammar(
            form, body.required_tools, self._opening_token_id, only_one=body.only_one_call
        )
        return grammar, "tools"

    async def _echo(self, body: GenerationBody, prompt: list[int]) -> Echo | None:
        """The prompt's text, if it is to be shown; of a long one it takes a while."""
        if not (isinstance(body, CompletionBody) and body.echo):
            return None
        detokenizer = self._text.detokenizer([], skip_special_tokens=body.skip_special_tokens)
        return await asyncio.to_thread(Echo.of, prompt, detokenizer)

    def _max_tokens(self, body: GenerationBody, num_prompt: int) -> int:
        prompt_field = body.prompt_field
        limit = self._generator.max_model_len
        if limit == 0:
            raise UnavailableError(self._generator.not_ready_reason() or "no worker serves")
        if num_prompt == 0:
            raise InvalidRequestError(f"{prompt_field} is empty", prompt_field)
        room = limit - num_prompt
        context = f"the model takes {limit} tokens of prompt and output together"
        if room < 1:
            message = f"{prompt_field} has {num_prompt} tokens, but {context}"
            raise ContextLengthError(message, prompt_field)
        if body.limit is not None and body.limit > room:
            message = f"{body.limit_field} is {body.limit} after {num_prompt} prompt tokens"
            raise ContextLengthError(f"{message}, but {context}", body.limit_field)
        if body.limit is not None:
            max_tokens = body.limit
        else:
            max_tokens = room if isinstance(body, ChatBody) else min(COMPLETION_TOKENS, room)
        if body.min_tokens > max_tokens:
            message = f"min_tokens {body.min_tokens} exceeds the {max_tokens} tokens to generate"
            raise InvalidRequestError(message, "min_tokens")
        return max_tokens

    def _sampling(
        self, body: GenerationBody, max_tokens: int, grammar: Grammar | None
    ) -> SamplingParams:
        logprobs = body.num_logprobs
        scored = isinstance(body, CompletionBody) and body.echo
        ranked = body.num_sequences > body.n  # by their log probabilities
        eos = () if body.ignore_eos else self._text.eos_token_ids
        return SamplingParams(
            max_tokens=max(max_tokens, 1),  # the workers sample one with any prompt
            temperature=body.temperature,
            top_k=min(max(body.top_k, 0), self._text.vocab_size),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            min_tokens=body.min_tokens,
            stop_token_ids=tuple(dict.fromkeys((*body.stop_token_ids, *eos))),
            logit_bias=self._logit_bias(body),
            logprobs=0 if logprobs is None and ranked else logprobs,
            prompt_logprobs=logprobs if scored else None,
            grammar=grammar,
        )

    def _logit_bias(self, body: GenerationBody) -> tuple[tuple[int, float], ...]:
        biases: dict[int, float] = {}
        for key, bias in body.logit_bias.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                message = f"logit_bias: {key!r} is not a token id"
                raise InvalidRequestError(message, "logit_bias")
            biases[int(key)] = bias
        self._text.check_token_ids([*biases], "logit_bias")
        return tuple(biases.items())

    def _output(
        self, body: GenerationBody, index: int, prompt: Sequence[int], echo: Echo | None
    ) -> Output:
        skip_special_tokens, tool_calls = body.skip_special_tokens, None
        form = self._text.tool_format
        if form is not None and isinstance(body, ChatBody) and body.offered_tools:
            tool_calls = ToolCallParser(form, only_one=body.only_one_call)
            skip_special_tokens &= self._opening_token_id is None
        reasoning = None
        if isinstance(body, ChatBody) and self._text.thinks:
            reasoning = ReasoningParser(inside=self._text.is_thinking(prompt))
        detokenizer = self._text.detokenizer(prompt, skip_special_tokens=skip_special_tokens)
        return Output(
            index,
            detokenizer,
            body.stop,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
            echo=echo,
            only_echo=body.limit == 0,
            reasoning=reasoning,
            tool_calls=tool_calls,
        )


def _seed(seed: int, sequence: int) -> int:
    """A seed for each sequence of a prompt: the request's own for the first."""
    if sequence == 0:
        return seed
    derived = hashlib.blake2b(b"%d %d" % (seed, sequence), digest_size=8)
    return int.from_bytes(derived.digest(), "little")
