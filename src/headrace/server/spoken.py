"""What one answer says, in OpenAI's terms: parts of a message as they come, and the message.

Each part keeps the keys of the others as null, which clients of SGLang expect; reasoning has both
of its names. Knows no streams.
"""

from typing import Any

from headrace.core.messages import Delta
from headrace.server.speech import Speech
from headrace.text.parsers.events import Arguments, Content, Event, Reasoning, ToolCall


class Spoken:
    """The text of one choice so far. `hold_reasoning`: reasoning comes in one piece."""

    def __init__(self, speech: Speech, *, hold_reasoning: bool) -> None:
        self._speech = speech
        self._parser = None if speech.plain else speech.parser()
        self._hold = hold_reasoning
        self._held = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    @property
    def called(self) -> bool:
        return bool(self._calls)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def read(self, delta: Delta) -> list[Event]:
        """What a delta says; the parser's last words with the final one."""
        if self._parser is None:
            said: list[Event] = [Content(delta.text)] if delta.text else []
        else:
            said = self._parser.feed(delta.text)
            if delta.finish is not None:
                said += self._parser.finish()
        for event in said:
            self._note(event)
        return self._without_held(said, delta.finish is not None) if self._hold else said

    def message(self) -> dict[str, Any]:
        """The whole message. Content is null where there are calls alone."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "reasoning_content": self.reasoning or None,
            "tool_calls": None,
        }
        if self._speech.reasoning:
            message["reasoning"] = message["reasoning_content"]
        if self._calls:
            for call, pieces in zip(self._calls, self._arguments, strict=True):
                call["function"]["arguments"] = "".join(pieces)
            message["tool_calls"] = self._calls
        return message

    def _note(self, event: Event) -> None:
        if isinstance(event, Content):
            self._content.append(event.text)
        elif isinstance(event, Reasoning):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCall):
            self._calls.append(_call(event, self._speech))
            self._arguments.append([])
        else:
            self._arguments[event.index].append(event.text)

    def _without_held(self, said: list[Event], ended: bool) -> list[Event]:
        out: list[Event] = []
        for event in said:
            if isinstance(event, Reasoning):
                self._held += event.text
                continue
            out += [Reasoning(self._held)] * bool(self._held)
            self._held = ""
            out.append(event)
        if ended and self._held:
            out.append(Reasoning(self._held))
        return out


def part_of(event: Event, speech: Speech) -> dict[str, Any]:
    """The delta of a streamed choice that says `event`. A call has its id and name only once."""
    if isinstance(event, Content):
        return {"content": event.text, "reasoning_content": None}
    if isinstance(event, Reasoning):
        return {"content": None, "reasoning_content": event.text, "reasoning": event.text}
    if isinstance(event, Arguments):
        call = {"index": event.index, "function": {"arguments": event.text}}
    else:
        call = _call(event, speech)
    return {"content": None, "reasoning_content": None, "tool_calls": [call]}


def _call(event: ToolCall, speech: Speech) -> dict[str, Any]:
    return {
        "index": event.index,
        "id": speech.call_id(event.id),
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }
