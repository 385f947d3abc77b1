"""Finds a checkpoint: a local folder as it is, a hub id through the hub's own client and cache.

Imports no torch: the router resolves the same name, for the tokenizer alone.
"""

from __future__ import annotations

from pathlib import Path

from protocol.errors import ConfigError

TEXT_FILES = ("config.json", "generation_config.json", "tokenizer*", "*_tokens*", "chat_template*")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
# Subfolders hold other formats; "consolidated" holds the same weights again under other names.
NEVER_FETCHED = ("*/*", "consolidated*")


def resolve_checkpoint(model: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder that holds ``model``, a local directory or a hub id such as ``org/name``.

    A hub id is downloaded, unless cached, with progress shown on stderr; ``weights=False`` leaves
    the weights out. Raises ConfigError when there is no such checkpoint or it cannot be fetched.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ConfigError(f"{model} is a local folder: it has no revision {revision!r}")
        return _with_config(local)
    if local.exists():
        raise ConfigError(f"{model} is a file; a model is a folder with config.json and weights")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f"there is no folder {model}")
    return _with_config(_fetch(model, weights, revision))


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a checkpoint: it has no config.json")
    return folder


def _fetch(repository: str, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if weights else ())],
                ignore_patterns=[*NEVER_FETCHED],
            )
        )
    except GatedRepoError as error:
        reason = "access is restricted: accept its terms on the hub and set HF_TOKEN"
        raise ConfigError(f"cannot fetch {repository}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "no such repository on the hub, or a private one (then set HF_TOKEN)"
        raise ConfigError(f"cannot fetch {repository}: {reason}") from error
    except HFValidationError as error:
        raise ConfigError(f"{repository} is neither a folder nor a hub id: {error}") from error
    except OSError as error:  # no connection, no space, an HTTP error
        reason = str(error).partition("\n")[0]
        hint = f"there is no folder of that name either, nor a copy in the cache ({reason})"
        raise ConfigError(f"cannot fetch {repository} from the hub; {hint}") from error
