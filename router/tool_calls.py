"""Reads tool calls out of what a model writes.

A call is a JSON object with the function's ``name`` and, as ``arguments`` or ``parameters``, an
object. It is shown as a call if it is whole and well formed, else as the text it was written as:
nothing is lost. White space beside calls is not shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import NoReturn

from router.stop_strings import overlap
from router.tool_formats import ToolFormat

ARGUMENT_KEYS = ("arguments", "parameters")
_JSON_OUTSIDE_STRINGS = frozenset('{}[]:,"+-.0123456789eEtrufalsn \t\r\n')


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """New output of one call. ``name`` is in its first delta only.

    A ``malformed`` call is none after all: it comes once more, as content.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    malformed: bool = False


def whole_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """The well-formed calls of one message, each from all its deltas."""
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        known = calls.get(delta.index)
        if delta.malformed:
            calls.pop(delta.index, None)
        elif known is None:
            calls[delta.index] = delta
        else:
            calls[delta.index] = replace(known, arguments=known.arguments + delta.arguments)
    return [*calls.values()]


@dataclass(slots=True)
class Parsed:
    """What some text was."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class _Phase(Enum):
    TEXT = auto()  # content, in which an opening may come
    OPEN = auto()  # a call must come
    CALL = auto()
    AFTER = auto()  # a separator or the closing may come


class ToolCallParser:
    """One message's. The outcome does not depend on where its text is cut into pieces.

    With ``only_one`` everything after the first call is ignored.
    """

    def __init__(self, form: ToolFormat, *, only_one: bool = False) -> None:
        self._form = form
        self._only_one = only_one
        self._phase = _Phase.TEXT
        self._held = ""  # not yet shown: may be a call's, or white space before one
        self._blank = True  # nothing but white space has come
        self._in_array = False
        self._call = _CallScanner()
        self._next_index = 0
        self._num_sent = 0  # characters of the call's arguments
        self.num_calls = 0  # complete ones
        self._steps: dict[_Phase, Callable[[str, Parsed], str]] = {
            _Phase.TEXT: self._text,
            _Phase.OPEN: self._open,
            _Phase.CALL: self._in_call,
            _Phase.AFTER: self._after,
        }

    @property
    def complete(self) -> bool:
        """Whether the only call allowed has been made."""
        return self._only_one and self.num_calls > 0

    def feed(self, text: str) -> Parsed:
        """What can be shown now."""
        parsed = Parsed()
        while text and not self.complete:
            text = self._steps[self._phase](text, parsed)
        return parsed

    def end(self) -> Parsed:
        """What was held back, at the message's end."""
        parsed = Parsed()
        if self._phase is _Phase.CALL:
            self._give_up(parsed)
        elif self._held.strip() or not self.num_calls:
            parsed.content = self._held
        self._held = ""
        return parsed

    # Each takes text and returns what the next phase is to take ---------------------------------

    def _text(self, text: str, parsed: Parsed) -> str:
        text = self._held + text
        opening = self._form.opening
        if self._form.bare and self._blank and text.lstrip().startswith("{"):
            start = end = text.index("{")
        else:
            start = text.find(opening)
            end = start + len(opening)
        opened = start >= 0
        if not opened:
            start = end = len(text) - overlap(text, opening)
        shown = text[:start].rstrip()
        parsed.content += shown
        self._blank = self._blank and not shown and not opened
        if not opened:
            self._held = text[len(shown) :]
            return ""
        self._held = text[len(shown) : end]
        self._phase, self._in_array = _Phase.OPEN, not self._form.array
        return text[end:]

    def _open(self, text: str, parsed: Parsed) -> str:
        for position, character in enumerate(text):
            if character == "{" and self._in_array:
                self._phase, self._call, self._num_sent = _Phase.CALL, _CallScanner(), 0
                return text[position:]
            if character == self._form.array and not self._in_array:
                self._in_array = True
            elif not character.isspace():
                self._give_up(parsed)
                return text[position:]
            self._held += character
        return ""

    def _in_call(self, text: str, parsed: Parsed) -> str:
        rest = text[self._call.feed(text) :]
        if self._call.complete:
            name = self._call.checked_name()
            if name is None:
                self._give_up(parsed)
                return rest
            self._send(name, self._call.arguments or "{}", parsed)
            self._next_index += 1
            self.num_calls += 1
            self._phase, self._held = _Phase.AFTER, ""
        elif rest:  # begins with what cannot be in a call
            self._give_up(parsed)
        elif self._call.name is not None and self._call.arguments:
            self._send(self._call.name, self._call.arguments, parsed)
        return rest

    def _after(self, text: str, parsed: Parsed) -> str:
        text, self._held = self._held + text, ""
        rest = text.lstrip()
        for mark, phase in (
            (self._form.separator, _Phase.OPEN),
            (self._form.closing, _Phase.TEXT),
        ):
            if mark and rest.startswith(mark):
                self._phase = phase
                self._held = mark if phase is _Phase.OPEN else ""
                return rest[len(mark) :]
            if mark.startswith(rest):
                self._held = text
                return ""
        self._phase = _Phase.TEXT
        return text

    def _send(self, name: str, arguments: str, parsed: Parsed) -> None:
        first = self._num_sent == 0
        new = arguments[self._num_sent :]
        if new:
            parsed.calls.append(ToolCallDelta(self._next_index, name if first else None, new))
        self._num_sent = len(arguments)

    def _give_up(self, parsed: Parsed) -> None:
        """Show what was taken for a call as content."""
        if self._phase is _Phase.CALL:
            self._held += self._call.text
            if self._call.name is not None and self._call.arguments:  # sent, if pieces are short
                parsed.calls.append(ToolCallDelta(self._next_index, malformed=True))
                self._next_index += 1
        parsed.content += self._held
        self._phase, self._held = _Phase.TEXT, ""


class _CallScanner:
    """Follows one JSON object as it comes, as far as it takes to find its end and its parts."""

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.complete = False
        self._depth = 0
        self._string_start = -1  # of the string we are in
        self._escaped = False
        self._key: str | None = None  # of the value we are in, at depth 1
        self._arguments_start = -1
        self._arguments_end: int | None = None

    @property
    def arguments(self) -> str:
        """The text of the arguments so far."""
        if self._arguments_start < 0:
            return ""
        return self.text[self._arguments_start : self._arguments_end]

    def feed(self, text: str) -> int:
        """Take characters up to the object's end, or to one that cannot be there: how many."""
        start = len(self.text)
        self.text += text
        for position in range(start, len(self.text)):
            taken = self._take(self.text[position], position)
            if self.complete or not taken:
                end = position + taken
                self.text = self.text[:end]
                return end - start
        return len(text)

    def checked_name(self) -> str | None:
        """The complete call's name; None if it is malformed."""
        try:
            call = json.loads(self.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return None
        values = [call[key] for key in ARGUMENT_KEYS if key in call]
        return self.name if all(isinstance(value, dict) for value in values) else None

    def _take(self, character: str, position: int) -> bool:
        if self._string_start >= 0:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                start, self._string_start = self._string_start, -1
                return self._depth != 1 or self._string(self.text[start : position + 1])
            return True
        if character == '"':
            self._string_start = position
        elif character in "{[":
            starts = character == "{" and self._depth == 1 and self._key in ARGUMENT_KEYS
            if starts and self._arguments_start < 0:
                self._arguments_start = position
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._arguments_start >= 0 and self._arguments_end is None:
                self._arguments_end = position + 1
            self.complete = self._depth == 0
        elif character == "," and self._depth == 1:
            self._key = None
        return character in _JSON_OUTSIDE_STRINGS

    def _string(self, literal: str) -> bool:
        try:
            value: str = json.loads(literal)
            value.encode()
        except ValueError:  # half a surrogate pair is one, too
            return False
        if self._key is None:
            self._key = value
        elif self._key == "name" and self.name is None:
            self.name = value
        return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
