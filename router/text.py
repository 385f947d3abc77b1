"""A checkpoint's text half: tokenizer, special tokens, chat template. Needs no weights."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.config import ModelConfig
from protocol.errors import ConfigError, InvalidRequestError
from router.chat_template import ChatTemplate
from router.detokenizer import Detokenizer
from router.reasoning import CLOSING, OPENING
from router.tool_formats import FORMATS, ToolFormat, detect

LONG_TEXT = 16_384  # characters; a longer text is tokenised in a thread


@dataclass(frozen=True, slots=True)
class TextModel:
    """Text to token ids and back for one model."""

    tokenizer: Tokenizer
    vocab_size: int  # ids the model takes; the tokenizer may know fewer
    eos_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    fingerprint: str  # of the files read
    tool_format: ToolFormat | None = None  # of the calls that it writes
    thinks: bool = False  # before it answers

    @classmethod
    def load(
        cls, folder: Path, tool_call_parser: str = "auto", reasoning_parser: str = "auto"
    ) -> TextModel:
        """Read a checkpoint's JSON files. Raises ConfigError naming what is missing or wrong.

        ``tool_call_parser`` is a format's name, "none", or "auto": what the chat template teaches;
        ``reasoning_parser`` is "think", "none" or the same "auto".
        """
        config = ModelConfig.load(folder)
        settings = _settings(folder)
        source = _template_source(folder, settings)
        special_tokens = _special_tokens(settings)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"cannot read {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos = config.eos_token_ids or _eos_token_ids(tokenizer, special_tokens)
        digest = hashlib.blake2b(repr(config).encode() + path.read_bytes(), digest_size=6)
        return cls(
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            eos_token_ids=eos,
            chat_template=ChatTemplate(source, special_tokens) if source is not None else None,
            fingerprint=f"fp_{digest.hexdigest()}",
            tool_format=_tool_format(tool_call_parser, source),
            thinks=_thinks(reasoning_parser, source),
        )

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A long one is encoded in a thread, beside the event loop."""
        if len(text) <= LONG_TEXT:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; ids that the tokenizer does not know give none."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A new one for a sequence that continues the prompt."""
        return Detokenizer(
            self.tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as prompt text, special tokens included. Raises InvalidRequestError."""
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions")
        if tools and not self.chat_template.takes_tools:
            raise InvalidRequestError("tools: this model's chat template takes none", "tools")
        return self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def is_thinking(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt ends where the model's thoughts begin."""
        if not self.thinks:
            return False
        return self.decode(prompt_token_ids[-2 * len(OPENING) :]).rstrip().endswith(OPENING)

    def special_token_id(self, text: str) -> int | None:
        """The id of a special token, which decoding may skip; None if the text is none."""
        for token_id, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.content == text and token.special:
                return int(token_id)
        return None

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise InvalidRequestError naming an id that the model does not have."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                limit = f"the vocabulary has ids 0 to {self.vocab_size - 1}"
                raise InvalidRequestError(f"{param}: no token {token_id}; {limit}", param)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Unlike ``encode``, this releases the GIL.
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} does not hold a JSON object")
        settings.update({key: value for key, value in content.items() if value is not None})
    return settings


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    match template:
        case None | str():
            return template
        case [*entries]:  # several, by name
            for entry in entries:
                match entry:
                    case {"name": "default", "template": str(source)}:
                        return source
    raise ConfigError(f"{folder}/tokenizer_config.json: chat_template holds no default template")


def _tool_format(name: str, template: str | None) -> ToolFormat | None:
    return detect(template or "") if name == "auto" else FORMATS.get(name)


def _thinks(name: str, template: str | None) -> bool:
    return CLOSING in (template or "") if name == "auto" else name == "think"


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, object]:
    def text(token: Any) -> object:
        return token.get("content") if isinstance(token, dict) else token

    named = {key: text(value) for key, value in settings.items() if key.endswith("_token")}
    additional = [text(token) for token in settings.get("additional_special_tokens", [])]
    strings = {key: value for key, value in named.items() if isinstance(value, str)}
    return {**strings, "additional_special_tokens": additional}


def _eos_token_ids(tokenizer: Tokenizer, special_tokens: Mapping[str, object]) -> tuple[int, ...]:
    token = special_tokens.get("eos_token")
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return () if token_id is None else (token_id,)
