"""Parts what a model thinks, between ``<think>`` and ``</think>``, from what it says."""

from __future__ import annotations

from router.stop_strings import overlap

OPENING = "<think>"
CLOSING = "</think>"


class ReasoningParser:
    """One message's. The outcome does not depend on where its text is cut into pieces.

    Thoughts may only begin the message, or go on from its prompt: then it begins ``inside``. White
    space around them is not shown.
    """

    def __init__(self, *, inside: bool) -> None:
        self._mark: str | None = CLOSING if inside else OPENING  # what may come; None: content
        self._blank = True  # of the thoughts, or of the content after them, nothing has come
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """New thoughts and new content."""
        text, self._held = self._held + text, ""
        thoughts = ""
        if self._mark == OPENING:
            begun = text.lstrip()
            if OPENING.startswith(begun):
                if begun != OPENING:
                    self._held = text
                    return "", ""
            elif not begun.startswith(OPENING):
                self._mark, self._blank = None, False
                return "", text
            self._mark, text = CLOSING, begun[len(OPENING) :]
        if self._mark == CLOSING:
            end = text.find(CLOSING)
            closed = end >= 0
            thoughts, rest = self._thoughts(text[:end] if closed else text, closed=closed)
            if not closed:
                self._held = rest
                return thoughts, ""
            self._mark, self._blank = None, True
            text = text[end + len(CLOSING) :]
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return thoughts, text

    def end(self) -> tuple[str, str]:
        """What was held back, at the message's end."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._mark == CLOSING else ("", held)

    def _thoughts(self, text: str, *, closed: bool) -> tuple[str, str]:
        """What can be shown now, and what cannot yet."""
        if self._blank:
            text = text.lstrip()
        shown = (text if closed else text[: len(text) - overlap(text, CLOSING)]).rstrip()
        self._blank = self._blank and not shown
        return shown, text[len(shown) :]
