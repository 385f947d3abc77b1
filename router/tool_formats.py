"""The ways in which models write tool calls: each a row of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """``opening`` ``array`` call ``separator`` call ... ``closing``, any of which may be empty."""

    opening: str
    closing: str = ""
    array: str = ""
    separator: str = ""  # none: every call has its own opening and closing
    bare: bool = False  # an output may also begin with a call, without the opening
    arguments: str = "arguments"  # the key that this format's models are trained to write
    padding: str = ""  # beside each call, as they are trained to write it


FORMATS = {
    "hermes": ToolFormat("<tool_call>", "</tool_call>", padding="\n"),
    "llama3_json": ToolFormat("<|python_tag|>", separator=";", bare=True, arguments="parameters"),
    "mistral": ToolFormat("[TOOL_CALLS]", "]", array="[", separator=","),
}


def detect(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it is none of these."""
    if "<tool_call>" in template and "<function=" not in template:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return FORMATS["mistral"]
    if '"parameters": dictionary of' in template:
        return FORMATS["llama3_json"]
    return None
