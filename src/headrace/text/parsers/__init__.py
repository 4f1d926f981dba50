"""Incremental parsers of what a model writes: reasoning, tool calls, content.

Pure functions of the text: they know no request, no protocol and no token.
"""

from typing import Any

from headrace.core.errors import Unsupported
from headrace.text.parsers.events import Content, Event, OutputParser


class PlainParser:
    """Everything is content."""

    def feed(self, text: str) -> list[Event]:
        """The text as it is."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing is ever held back."""
        return []


def make_parser(
    reasoning: str, tools_dialect: str, tools: list[dict[str, Any]], *, thinking: bool
) -> OutputParser:
    """The parser of one answer. `reasoning` and `tools_dialect` are names that `detect` gives."""
    return PlainParser()


def detect(chat_template: str) -> tuple[str, str]:
    """(reasoning dialect, tools dialect) of a model by its chat template; "" if there is none."""
    return "", ""


def structure(
    dialect: str, tools: list[dict[str, Any]], choice: str | dict[str, Any]
) -> dict[str, Any] | None:
    """The structural tag that makes a model obey `choice`; None if it is free to choose."""
    if choice in ("auto", "none"):
        return None
    raise Unsupported("tool_choice: only 'auto' and 'none' are supported yet", field="tool_choice")
