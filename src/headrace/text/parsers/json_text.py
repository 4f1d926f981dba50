"""JSON that arrives in pieces: checked as it comes, passed on as it is.

What is passed on is always the beginning of valid JSON (RFC 8259). One thing is repaired: models
write line breaks and tabs into strings, which are escaped here. Knows nothing of tools.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from headrace.text.parsers.source import Mismatch, Source, Wait

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE_RUN = re.compile(r"[ \t\r\n]*")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
# The parts of a number: (part, kind of the next character) -> part. "0" also stands for 1-9 where
# a leading zero is fine.
_NUMBER: dict[tuple[str, str], str] = {
    ("-", "0"): "zero",
    ("-", "1"): "int",
    ("int", "0"): "int",
    ("int", "1"): "int",
    ("zero", "."): ".",
    ("int", "."): ".",
    (".", "0"): "frac",
    (".", "1"): "frac",
    ("frac", "0"): "frac",
    ("frac", "1"): "frac",
    ("zero", "e"): "e",
    ("int", "e"): "e",
    ("frac", "e"): "e",
    ("e", "+"): "sign",
    ("e", "-"): "sign",
    ("e", "0"): "exp",
    ("e", "1"): "exp",
    ("sign", "0"): "exp",
    ("sign", "1"): "exp",
    ("exp", "0"): "exp",
    ("exp", "1"): "exp",
}
_NUMBER_ENDS = {"zero", "int", "frac", "exp"}
_NUMBER_KINDS = {"0": "0", ".": ".", "e": "e", "E": "e", "+": "+", "-": "-"} | dict.fromkeys(
    "123456789", "1"
)


class JsonScanner:
    """Follows one JSON value. `done` after its last character, `failed` before a wrong one."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []
        self._step: Callable[[str], bool] = self._value
        # What may come at once before the next step: space, the text of a string, or nothing.
        self._run: re.Pattern[str] | None = _SPACE_RUN
        self._key = False
        self._rest = ""
        self._part = ""

    def advance(self, text: str, at: int) -> tuple[int, str]:
        """Read `text` from `at`: where it stopped, and the valid JSON that was read."""
        out: list[str] = []
        while at < len(text) and not self.done:
            if self._run is not None:
                match = self._run.match(text, at)
                assert match is not None
                out.append(match.group())
                at = match.end()
                if at == len(text):
                    break
            char = text[at]
            if self._run is _STRING_RUN and char < " ":
                out.append(json.dumps(char)[1:-1])
            elif self._step(char):
                out.append(char)
            elif self.done or self.failed:
                break
            else:
                continue  # the end of a number: what ended it is read again
            at += 1
        return at, "".join(out)

    # Steps read one character each; false: not read, as it is wrong or belongs to what follows.

    def _value(self, char: str) -> bool:
        if char in "{[":
            self._open.append(char)
            self._step = self._first_key if char == "{" else self._first_item
        elif char == '"':
            self._string(key=False)
        elif char in _LITERALS:
            self._rest = _LITERALS[char][1:]
            self._step, self._run = self._literal, None
        elif char in "-0123456789":
            self._part = {"-": "-", "0": "zero"}.get(char, "int")
            self._step, self._run = self._number, None
        else:
            return self._fail()
        return True

    def _first_item(self, char: str) -> bool:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> bool:
        return self._close(char) if char == "}" else self._next_key(char)

    def _next_key(self, char: str) -> bool:
        if char != '"':
            return self._fail()
        self._string(key=True)
        return True

    def _colon(self, char: str) -> bool:
        self._step = self._value
        return char == ":" or self._fail()

    def _after_value(self, char: str) -> bool:
        if char == ",":
            self._step = self._next_key if self._open[-1] == "{" else self._value
            return True
        return self._close(char)

    def _close(self, char: str) -> bool:
        if not self._open or char != {"{": "}", "[": "]"}[self._open[-1]]:
            return self._fail()
        self._open.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._step, self._run = self._after_value, _SPACE_RUN
        self.done = not self._open

    def _string(self, key: bool) -> None:
        self._key = key
        self._step, self._run = self._in_text, _STRING_RUN

    def _in_text(self, char: str) -> bool:
        if char == "\\":
            self._step, self._run = self._escape, None
        elif self._key:
            self._step, self._run = self._colon, _SPACE_RUN
        else:
            self._end_value()
        return True

    def _escape(self, char: str) -> bool:
        if char == "u":
            self._rest = "0000"
            self._step = self._hex
            return True
        self._string(self._key)
        return char in '"\\/bfnrt' or self._fail()

    def _hex(self, char: str) -> bool:
        if char not in "0123456789abcdefABCDEF":
            return self._fail()
        self._rest = self._rest[1:]
        if not self._rest:
            self._string(self._key)
        return True

    def _literal(self, char: str) -> bool:
        if char != self._rest[0]:
            return self._fail()
        self._rest = self._rest[1:]
        if not self._rest:
            self._end_value()
        return True

    def _number(self, char: str) -> bool:
        part = _NUMBER.get((self._part, _NUMBER_KINDS.get(char, "")))
        if part is not None:
            self._part = part
            return True
        if self._part not in _NUMBER_ENDS:
            return self._fail()
        self._end_value()
        return False

    def _fail(self) -> bool:
        self.failed = True
        return False

    def end(self) -> None:
        """The text has ended: a number may be complete."""
        if not self._open and self._step == self._number and self._part in _NUMBER_ENDS:
            self.done = True


def pass_json(source: Source, sink: Callable[[str], None]) -> Wait[None]:
    """Pass one JSON value on as it comes.

    Raises:
        Mismatch: something else comes; it has not been read.
    """
    scanner = JsonScanner()
    while not scanner.done:
        if not (yield from source.more()):
            scanner.end()
            if not scanner.done:
                raise Mismatch
            return
        end, piece = scanner.advance(source.text, source.at)
        source.give(end)
        sink(piece)
        if scanner.failed:
            raise Mismatch


def take_json(source: Source) -> Wait[str]:
    """One JSON value, remembered.

    Raises:
        Mismatch: something else comes.
    """
    scanner = JsonScanner()
    pieces: list[str] = []
    while not scanner.done:
        if not (yield from source.more()):
            scanner.end()
            break
        end, piece = scanner.advance(source.text, source.at)
        source.take(end)
        pieces.append(piece)
        if scanner.failed:
            break
    if not scanner.done:
        raise Mismatch
    return "".join(pieces)


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON (also NaN and infinities), or too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too deep") from None


def dumps(value: Any) -> str:
    """JSON that any client can read; characters stay as they are unless they are half of one.

    Raises:
        ValueError: a value that JSON does not have, or too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("too deep") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
