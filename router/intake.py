"""From a body to a ``Job``: prompts become token ids, options become ``SamplingParams``."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from functools import partial

from protocol.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from protocol.sampling import SamplingParams
from router.answers import AnswerHead, ChatShape, CompletionShape, Shape
from router.generation import GenerationRequest, Generator
from router.output import Output
from router.schemas import (
    ChatBody,
    ChatMessage,
    ChatOptions,
    CompletionBody,
    GenerationBody,
    Prompt,
    TokenizeBody,
)
from router.stream import Choice, Job
from router.text import TextModel

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context
MANY_MESSAGES = 100  # more are rendered in a thread


class Intake:
    """Validates requests for one served model. Everything wrong raises InvalidRequestError."""

    def __init__(self, served_model_name: str, text: TextModel, generator: Generator) -> None:
        self._served_model_name = served_model_name
        self._text = text
        self._generator = generator

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError unless the model is served; None means whichever is."""
        if name is not None and name != self._served_model_name:
            message = f"the model {name!r} does not exist; this is {self._served_model_name!r}"
            raise ModelNotFoundError(message, "model")

    async def completion(self, body: CompletionBody) -> Job:
        """The job of a completion request."""
        arrived = time.perf_counter()
        self.check_model(body.model)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [await self._prompt_ids(prompt, special) for prompt in body.prompt]
        return self._job(body, CompletionShape(), "cmpl", "prompt", prompts, arrived)

    async def chat(self, body: ChatBody) -> Job:
        """The job of a chat request."""
        arrived = time.perf_counter()
        self.check_model(body.model)
        prompt = await self._chat_ids(body.messages, body, bool(body.add_special_tokens))
        return self._job(body, ChatShape(), "chatcmpl", "messages", [prompt], arrived)

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

    def _job(
        self,
        body: GenerationBody,
        shape: Shape,
        prefix: str,
        prompt_field: str,
        prompts: Sequence[list[int]],
        arrived: float,
    ) -> Job:
        answer_id = f"{prefix}-{secrets.token_hex(16)}"
        self._text.check_token_ids(body.stop_token_ids, "stop_token_ids")
        choices = []
        for index, prompt in enumerate(prompts):
            max_tokens = self._max_tokens(body, prompt_field, len(prompt))
            request = GenerationRequest(
                request_id=f"{answer_id}-{index}",
                prompt_token_ids=prompt,
                sampling=self._sampling(body, max_tokens),
                timeout=body.timeout,
            )
            choices.append(Choice(request, self._output(body, index, prompt)))
        return Job(
            head=AnswerHead(answer_id, self._served_model_name, self._text.fingerprint),
            shape=shape,
            choices=choices,
            arrived=arrived,
            stream=body.stream,
            include_usage=body.include_usage,
            return_token_ids=body.return_token_ids,
        )

    def _max_tokens(self, body: GenerationBody, prompt_field: str, num_prompt: int) -> int:
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

    def _sampling(self, body: GenerationBody, max_tokens: int) -> SamplingParams:
        eos = () if body.ignore_eos else self._text.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_k=min(max(body.top_k, 0), self._text.vocab_size),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
            min_tokens=body.min_tokens,
            stop_token_ids=tuple(dict.fromkeys((*body.stop_token_ids, *eos))),
        )

    def _output(self, body: GenerationBody, index: int, prompt: Sequence[int]) -> Output:
        detokenizer = self._text.detokenizer(prompt, skip_special_tokens=body.skip_special_tokens)
        return Output(
            index,
            detokenizer,
            body.stop,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
        )
