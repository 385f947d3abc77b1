"""Finds stop strings in text that comes in pieces; nothing of one is ever shown.

The outcome does not depend on where the pieces are cut: the stop string that ends first counts,
the longest of those that end together.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One sequence's search. With ``include`` the stop string itself is shown."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""  # the text's end that may be a stop string's beginning
        self.matched = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. Nothing more comes once ``matched``."""
        if self.matched or not text:
            return ""
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.matched, self._held = True, ""
            end, start = min(found)
            return text[: end if self._include else start]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, at the sequence's end."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
