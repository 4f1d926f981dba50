"""Text that arrives in pieces, read by a grammar that is written as if all of it were there.

A grammar is a generator over a `Source`: it yields when it needs more text than there is. Each
reading step waits until the text settles its outcome whatever may follow, so a grammar cannot see
how the text was cut; this is what makes a parser a pure function of the whole text. Knows no
dialect.

What a grammar takes without passing it on is remembered until `drop`, and `recall` gives it back:
nothing is lost when a construct turns out to be none.
"""

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

from headrace.text.parsers.events import Arguments, Content, Event, Reasoning, ToolCall

T = TypeVar("T")
Wait = Generator[None, None, T]

SPACE = " \t\r\n"
# Layout between a text and a marker: at most this much is held back and left out.
MAX_LAYOUT = 8
_SPACES = re.compile(r"[ \t\r\n]*")


class Mismatch(Exception):
    """The text is not what the grammar was reading."""


class Source:
    """The text not yet read, and what was taken of it since the last `drop`."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._taken: list[str] = []

    def push(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0

    # -- without waiting ----------------------------------------------------------------------

    def take(self, end: int) -> str:
        """Read up to `end` and remember it."""
        piece = self.give(end)
        self._taken.append(piece)
        return piece

    def give(self, end: int) -> str:
        """Read up to `end`; the caller passes it on."""
        piece = self.text[self.at : end]
        self.at = end
        return piece

    def drop(self) -> None:
        """What was taken has become an event, or is layout."""
        self._taken.clear()

    def recall(self) -> str:
        """What was taken, to be passed on as it is."""
        text = "".join(self._taken)
        self._taken.clear()
        return text

    def drop_layout(self) -> None:
        """Drop what was taken if it is white space."""
        if not "".join(self._taken).strip(SPACE):
            self.drop()

    # -- waiting ------------------------------------------------------------------------------

    def more(self) -> Wait[bool]:
        """Wait for a character; false at the end of the text."""
        while self.at == len(self.text):
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Wait[str]:
        """The next character, "" at the end."""
        return self.text[self.at] if (yield from self.more()) else ""

    def spaces(self) -> Wait[None]:
        """Take white space."""
        while (yield from self.more()):
            match = _SPACES.match(self.text, self.at)
            assert match is not None
            self.take(match.end())
            if self.at < len(self.text):
                return

    def matches(self, marker: str) -> Wait[bool]:
        """Take `marker` if it comes next."""
        return bool((yield from self.match((marker,))))

    def match(self, markers: Sequence[str]) -> Wait[str]:
        """Take the longest of `markers` that comes next; "" if none does."""
        while True:
            found, open_ended = _at(self.text, self.at, markers)
            if not open_ended or self.ended:
                if found:
                    self.take(self.at + len(found))
                return found
            yield

    def expect(self, markers: Sequence[str]) -> Wait[str]:
        """Take one of `markers`.

        Raises:
            Mismatch: none comes next.
        """
        found = yield from self.match(markers)
        if not found:
            raise Mismatch
        return found

    def run(self, pattern: re.Pattern[str], limit: int) -> Wait[str]:
        """Take what matches `pattern`, which describes one character; at most `limit`."""
        found = ""
        while len(found) < limit and (yield from self.more()):
            if not pattern.match(self.text[self.at]):
                break
            found += self.take(self.at + 1)
        return found

    def held_until(self, markers: Sequence[str]) -> Wait[tuple[str, str]]:
        """Take text until one of `markers`; both, the marker not read, or "" at the end."""
        pieces: list[str] = []

        def sink(text: str) -> None:
            pieces.append(text)
            self._taken.append(text)

        found = yield from self.until(markers, sink)
        return "".join(pieces), found

    def until(
        self,
        markers: Sequence[str],
        sink: Callable[[str], None],
        layout: str = "",
        most: int = MAX_LAYOUT,
    ) -> Wait[str]:
        """Pass text to `sink` until one of `markers`; returns it, not read, or "" at the end.

        Of markers that begin at the same place the longest counts. Up to `most` characters of
        `layout` before the marker are taken instead. Held back is only what may become a marker,
        and such layout.
        """
        first = _first_characters(tuple(markers), layout)
        while True:
            end, found = self._search(markers, layout, most, first)
            if end > self.at:
                sink(self.give(end))
            if found:
                self.take(self.at + _layout_length(self.text, self.at, layout))
                return found
            if self.ended:
                if self.at < len(self.text):
                    sink(self.give(len(self.text)))
                return ""
            yield

    def rest(self, sink: Callable[[str], None]) -> Wait[None]:
        """Pass on whatever comes."""
        while (yield from self.more()):
            sink(self.give(len(self.text)))

    def _search(
        self, markers: Sequence[str], layout: str, most: int, first: re.Pattern[str]
    ) -> tuple[int, str]:
        """How far the text is certain, and the marker there if it is complete."""
        at = self.at
        while match := first.search(self.text, at):
            at = match.start()
            after = at + _layout_length(self.text, at, layout)
            found, open_ended = _at(self.text, after, markers)
            if open_ended and not self.ended:
                return max(at, after - most), ""
            if found:
                return max(at, after - most), found
            at = max(after, at + 1)
        return len(self.text), ""


def _layout_length(text: str, at: int, layout: str) -> int:
    end = at
    while end < len(text) and text[end] in layout:
        end += 1
    return end - at


def _at(text: str, at: int, markers: Sequence[str]) -> tuple[str, bool]:
    """The longest marker at `at`, and whether more text could make a longer one."""
    found, open_ended = "", False
    for marker in markers:
        if text.startswith(marker, at):
            found = marker if len(marker) > len(found) else found
        elif len(text) - at < len(marker) and marker.startswith(text[at : at + len(marker)]):
            open_ended = True
    return found, open_ended


@lru_cache(maxsize=256)
def _first_characters(markers: tuple[str, ...], layout: str) -> re.Pattern[str]:
    """Where a marker, or the layout before one, may begin."""
    return re.compile("[" + re.escape("".join(marker[0] for marker in markers) + layout) + "]")


class Out:
    """Events in the making; neighbors of one kind become one."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._calls = 0

    def content(self, text: str) -> None:
        if text:
            last = self._events[-1] if self._events else None
            if isinstance(last, Content):
                self._events[-1] = Content(last.text + text)
            else:
                self._events.append(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            last = self._events[-1] if self._events else None
            if isinstance(last, Reasoning):
                self._events[-1] = Reasoning(last.text + text)
            else:
                self._events.append(Reasoning(text))

    def call(self, name: str, id: str = "") -> None:
        """A call begins; `arguments` are its own until the next one."""
        self._events.append(ToolCall(self._calls, name, id))
        self._calls += 1

    def arguments(self, text: str) -> None:
        if text:
            last = self._events[-1] if self._events else None
            if isinstance(last, Arguments):
                self._events[-1] = Arguments(last.index, last.text + text)
            else:
                self._events.append(Arguments(self._calls - 1, text))

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class GrammarParser:
    """An `OutputParser` that runs a grammar. The grammar reads until the text has ended."""

    def __init__(self, grammar: Callable[[Source, Out], Wait[None]]) -> None:
        self._source = Source()
        self._out = Out()
        self._run = grammar(self._source, self._out)

    def feed(self, text: str) -> list[Event]:
        if text:
            self._source.push(text)
            next(self._run, None)
        return self._out.drain()

    def finish(self) -> list[Event]:
        self._source.ended = True
        next(self._run, None)
        return self._out.drain()


class Chain:
    """Two parsers in a row: the second reads the content that the first finds."""

    def __init__(self, first: GrammarParser, second: GrammarParser) -> None:
        self._first = first
        self._second = second

    def feed(self, text: str) -> list[Event]:
        return self._pass_on(self._first.feed(text))

    def finish(self) -> list[Event]:
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, events: list[Event]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            out += self._second.feed(event.text) if isinstance(event, Content) else [event]
        return out
