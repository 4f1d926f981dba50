"""How calls stand in a text: between markers, or as the whole of it. One grammar for each.

A dialect says what its markers are and how the body of a call reads. A call begins (`ToolCall`) as
soon as its name and the start of its arguments are certain; what turns out to be no call before
that is content, markers included. If its arguments go wrong later, they end there and the rest is
content: arguments are always a JSON object or, cut short, the beginning of one.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from headrace.text.parsers.json_text import pass_json
from headrace.text.parsers.schema import Tools
from headrace.text.parsers.source import SPACE, Mismatch, Out, Source, Wait

Grammar = Callable[[Source, Out], Wait[None]]
_NAME = re.compile(r"[\w.:/-]")
MAX_NAME = 256


class Reader:
    """What the body of a call reads from and writes to."""

    def __init__(self, source: Source, out: Out, tools: Tools) -> None:
        self.source = source
        self.out = out
        self.tools = tools

    def name(self) -> Wait[str]:
        """Take a name.

        Raises:
            Mismatch: there is none.
        """
        found = yield from self.source.run(_NAME, MAX_NAME)
        if not found:
            raise Mismatch
        return found

    def is_name(self, text: object) -> bool:
        """Whether this may be the name of a tool, given or not."""
        return isinstance(text, str) and (
            text in self.tools
            or (len(text) <= MAX_NAME and bool(re.fullmatch(f"{_NAME.pattern}+", text)))
        )

    def begin(self, name: str, id: str = "") -> None:
        """The call is certain; what was taken is its head."""
        self.out.call(name, id)
        self.source.drop()

    def write(self, text: str) -> None:
        """More of the arguments, made of what was taken."""
        self.out.arguments(text)
        self.source.drop()

    def arguments(self, name: str, id: str = "") -> Wait[None]:
        """A call of `name` whose arguments, a JSON object, come next.

        Raises:
            Mismatch: no object comes, or it is wrong from here on.
        """
        yield from self.source.spaces()
        if (yield from self.source.peek()) != "{":
            raise Mismatch
        self.begin(name, id)
        yield from pass_json(self.source, self.out.arguments)


Body = Callable[[Reader], Wait[None]]


@dataclass(frozen=True)
class Markers:
    """Around calls: `call` opens one, `ends` may close it; `opens` and `closes` hold several.

    `inside`: further marks of a call. `special`: the triggers are tokens that no other text has.
    """

    call: str
    ends: tuple[str, ...] = ()
    opens: str = ""
    closes: str = ""
    inside: tuple[str, ...] = ()
    special: bool = False

    @property
    def triggers(self) -> tuple[str, ...]:
        """What a text of calls begins with."""
        return (self.opens, self.call) if self.opens else (self.call,)

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(
            text for text in (*self.triggers, *self.ends, self.closes, *self.inside) if text
        )


def marked(markers: Markers, body: Body, tools: Tools) -> Grammar:
    """Calls between markers, anywhere in the text."""

    def grammar(source: Source, out: Out) -> Wait[None]:
        reader = Reader(source, out, tools)
        while (yield from source.until(markers.triggers, out.content, SPACE)):
            with suppress(Mismatch):
                yield from _section(reader, markers, body)
            out.content(source.recall())

    return grammar


def _section(reader: Reader, markers: Markers, body: Body) -> Wait[None]:
    """Calls one after another up to the first text that is none."""
    source = reader.source
    joints = tuple(text for text in (*markers.triggers, markers.closes) if text)
    called = False
    while True:
        yield from source.spaces()
        marker = yield from source.match(joints)
        if marker == markers.call:
            yield from body(reader)
            called = True
            yield from source.spaces()
            if (yield from source.match(markers.ends)):
                source.drop()
        elif marker and marker == markers.closes and called:
            source.drop()
        elif not marker:
            break
    if called and not (yield from source.more()):
        source.drop_layout()  # before more text it belongs to that text


def unmarked(body: Body, tags: tuple[str, ...], tools: Tools) -> Grammar:
    """Calls as the whole text, or after one of `tags`; the body reads all calls in a row."""

    def grammar(source: Source, out: Out) -> Wait[None]:
        reader = Reader(source, out, tools)
        yield from source.spaces()
        while True:
            yield from source.match(tags)
            with suppress(Mismatch):
                yield from body(reader)
            out.content(source.recall())
            if not tags:
                yield from source.rest(out.content)
            if not tags or not (yield from source.until(tags, out.content, SPACE)):
                return

    return grammar
