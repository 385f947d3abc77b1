"""Checkpoints' text files: tokenizer, special tokens, chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError, InvalidRequestError
from router.chat_template import ChatTemplate
from router.text import TextModel
from tests.router.conftest import MODEL

CHAT = [
    {"role": "system", "content": " Be <brief> & 'clear'. "},
    {"role": "user", "content": "Hi 😀"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
]

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ["user", "assistant", "system"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {% generation %}
[{{ message.role }}] {{ message.content }}{{ message | tojson }}
    {% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}
[assistant]{% endif %}
{{ messages | map(attribute="role") | list | tojson(indent=2) }}
{{ strftime_now("%Y") | length }}{{ enable_thinking is defined and enable_thinking }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(MODEL / name, tmp_path)
    return tmp_path


def configure(folder: Path, **changes: Any) -> TextModel:
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    return TextModel.load(folder)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_chats_render_as_transformers_renders_them(
    folder: Path, template: str | None, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = oracle.apply_chat_template(
        CHAT, add_generation_prompt=add_generation_prompt, tokenize=False, enable_thinking=True
    )
    text = TextModel.load(folder)
    options: dict[str, Any] = {"variables": {"enable_thinking": True}}
    rendered = text.render_chat(CHAT, add_generation_prompt=add_generation_prompt, **options)
    assert rendered == expected
    assert "😀" in rendered


async def test_text_is_tokenised_as_transformers_tokenises_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = TextModel.load(folder)
    for sample in ("Hi <|user|> 😀\n\n  x", "long " * 10_000):
        assert await text.encode(sample) == oracle(sample).input_ids
        bare = oracle(sample, add_special_tokens=False).input_ids
        assert await text.encode(sample, add_special_tokens=False) == bare
        assert text.decode(bare) == sample


def test_a_template_refuses_with_its_own_words() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    with pytest.raises(InvalidRequestError, match="unknown role tool"):
        template.render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_failing_template_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_messages_are_data_and_no_templates() -> None:
    rendered = ChatTemplate("{{ messages[0].content }}", {}).render(
        [{"role": "user", "content": "{{ 7 * 7 }}"}]
    )
    assert rendered == "{{ 7 * 7 }}"


def test_variables_do_not_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ x }}", {})
    assert template.render([], variables={"messages": [1, 2], "x": "y"}) == "0y"


def test_named_templates(folder: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ eos_token }}"}]
    text = configure(folder, chat_template=named, eos_token={"content": "<end>"})
    assert text.render_chat(CHAT) == "<end>"


def test_the_file_wins_over_the_setting(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert TextModel.load(folder).render_chat(CHAT) == "from the file"


def test_without_a_template_a_chat_is_refused(folder: Path) -> None:
    text = configure(folder, chat_template=...)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        text.render_chat(CHAT)


def test_eos_tokens(folder: Path) -> None:
    assert TextModel.load(folder).eos_token_ids == (1, 5)
    (folder / "generation_config.json").unlink()
    assert TextModel.load(folder).eos_token_ids == (1,)
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert configure(folder, eos_token="<|end|>").eos_token_ids == (5,)


async def test_a_tokenizers_own_truncation_is_off(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    assert len(await TextModel.load(folder).encode("one two three four five six")) > 6


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [5]}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "cannot be compiled"),
        ("config.json", "{}", "not supported"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    folder: Path, name: str, content: str | None, complaint: str
) -> None:
    path = folder / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        TextModel.load(folder)
