"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 1, **{f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes of ``10GiB``, ``1.5TB`` or ``4096``. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or (not match[2] and "." in match[1]):
        raise ValueError(f"{text!r} is not a size such as 10GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def checked_size(text: str | None) -> str | None:
    """An option's value if it is a size. Raises typer.BadParameter."""
    try:
        parse_size(text or "0")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text
