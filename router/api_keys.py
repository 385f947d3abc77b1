"""Who may use the HTTP interface: bearer tokens, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from protocol.errors import ConfigError

ANYBODY = "anybody"


class ApiKeys:
    """The keys that let a client in; with none of them everybody is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: str) -> str | None:
        """Who asks with this ``Authorization`` header: a name for its key; None: not let in.

        Takes the same time whichever key it is, and however much of it is right: digests of one
        length are compared, each with every key.
        """
        if not self._digests:
            return ANYBODY
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip().encode("latin-1"))  # as the server has decoded it
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex() if any(known) and scheme.lower() == "bearer" else None


def read_api_keys(path: Path) -> list[str]:
    """One key a line; empty lines and lines that begin with # are skipped. Raises ConfigError."""
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"the API keys in {path} are readable by others: chmod 600 it")
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"no API keys in {path}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError(f"{path}: a key holds no spaces, and each has a line of its own")
    if not keys:
        raise ConfigError(f"{path} holds no API key: write one in a line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
