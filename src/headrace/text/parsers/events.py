"""What a parser makes of generated text, piece by piece.

Every protocol adapter turns these events into its own wire format; no parser knows a protocol.
Invariant: joining the pieces of one kind gives the same whole however the text was cut.
"""

from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    """More of the answer's text."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """More of the reasoning's text."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call of the tool `name` begins; calls are numbered from 0.

    `id` is what the model itself called it, empty if its dialect has no ids.
    """

    index: int
    name: str
    id: str = ""


class Arguments(msgspec.Struct, frozen=True):
    """More of the arguments of call `index`, as JSON text; the pieces together are one object."""

    index: int
    text: str


Event = Content | Reasoning | ToolCall | Arguments


class OutputParser(Protocol):
    """The state of one generated answer."""

    def feed(self, text: str) -> list[Event]:
        """Events that `text`, which follows what was fed before, makes certain."""
        ...

    def finish(self) -> list[Event]:
        """What was held back; the text has ended."""
        ...
