"""Finding a checkpoint: folders, hub ids and every way in which there is none."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from engine.checkpoint import resolve_checkpoint
from protocol.errors import ConfigError

FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "onnx/model.safetensors",
    "pytorch_model.bin",
    "README.md",
]


def test_a_folder_is_itself(checkpoint: Callable[[str], Path]) -> None:
    assert resolve_checkpoint(str(checkpoint("llama"))) == checkpoint("llama")


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no folder {model}"):
        resolve_checkpoint(model)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ConfigError, match=r"model\.gguf is a file"):
        resolve_checkpoint(str(path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_checkpoint(str(tmp_path))


def test_a_folder_has_no_revision(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no revision 'main'"):
        resolve_checkpoint(str(checkpoint("llama")), revision="main")


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Replaces the download; the list receives the names of the files asked for."""
    fetched: list[str] = []

    def download(repository: str, **options: Any) -> str:
        assert repository == "org/name"
        assert options.pop("revision") == "v1"
        allowed, ignored = options.pop("allow_patterns"), options.pop("ignore_patterns")
        assert not options
        fetched.extend(
            name
            for name in FILES
            if any(fnmatch(name, pattern) for pattern in allowed)
            and not any(fnmatch(name, pattern) for pattern in ignored)
        )
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def test_only_what_is_needed_is_fetched(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fake_hub(monkeypatch, checkpoint("llama"))
    assert resolve_checkpoint("org/name", revision="v1") == checkpoint("llama")
    assert fetched == FILES[:8]


def test_the_router_fetches_no_weights(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fake_hub(monkeypatch, checkpoint("llama"))
    resolve_checkpoint("org/name", weights=False, revision="v1")
    assert fetched == FILES[:6]


def test_a_hub_id_without_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot fetch org/name from the hub"):
        resolve_checkpoint("org/name")


def test_neither_folder_nor_hub_id() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        resolve_checkpoint("not a name")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "cannot fetch org/name: access is restricted"),
        (RepositoryNotFoundError, "cannot fetch org/name: no such repository"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: type[RepositoryNotFoundError], message: str
) -> None:
    request = httpx.Request("GET", "https://hub.invalid/org/name")

    def refuse(*_: Any, **__: Any) -> str:
        raise kind("refused", response=httpx.Response(403, request=request))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=message):
        resolve_checkpoint("org/name")
