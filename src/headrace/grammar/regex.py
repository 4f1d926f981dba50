"""Regular expressions as trees: the part of the syntax that every dialect reads alike.

    characters, escapes of punctuation and \\n \\r \\t \\f \\v \\xHH \\uHHHH \\u{H..} \\x{H..}
    .  [a-z]  [^a-z]  \\d \\w \\s and \\D \\W \\S (of ASCII)
    ( )  (?: )  |  * + ? {m} {m,} {m,n}
    ^ and $ at the ends of a whole pattern or of one of its alternatives

For engines whose own reading cannot be trusted: what is not listed here is refused, and the tree is
written out in the plainest syntax there is. Pure.
"""

import re
from typing import NamedTuple

Range = tuple[int, int]

MAX_DEPTH = 100
# Of all repetitions together, multiplied where they are nested.
MAX_SIZE = 20_000
LAST = 0x10FFFF
_DIGIT: tuple[Range, ...] = ((48, 57),)
_WORD: tuple[Range, ...] = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: tuple[Range, ...] = ((9, 13), (32, 32))
_LINE_ENDS: tuple[Range, ...] = ((10, 10), (13, 13), (0x2028, 0x2029))
_SHORT = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_MARKS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_CODE = re.compile(r"[xu]\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_COUNT = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}")


class UnknownSyntax(ValueError):
    """The text says what is not supported."""


class Characters(NamedTuple):
    """One character out of sorted ranges of code points."""

    ranges: tuple[Range, ...]


class Sequence(NamedTuple):
    parts: "tuple[Tree, ...]"


class Choice(NamedTuple):
    branches: "tuple[Tree, ...]"


class Times(NamedTuple):
    """`most`: None for any number."""

    inside: "Tree"
    least: int
    most: int | None

    @property
    def mark(self) -> str:
        """As all dialects write it."""
        for mark, counts in _MARKS.items():
            if counts == (self.least, self.most):
                return mark
        return f"{{{self.least},{'' if self.most is None else self.most}}}"


class Search(NamedTuple):
    """One alternative of a whole pattern, and where it is anchored."""

    inside: "Tree"
    at_start: bool
    at_end: bool


Tree = Characters | Sequence | Choice | Times

ANY = Characters(((0, LAST),))


def parse(pattern: str) -> list[Search]:
    """The alternatives of a pattern.

    Raises:
        UnknownSyntax: something that is not listed above, or repetitions beyond `MAX_SIZE`.
    """
    parser = _Parser(pattern)
    found = parser.whole()
    if sum(size(one.inside) for one in found) > MAX_SIZE:
        raise UnknownSyntax(f"repetitions make it larger than {MAX_SIZE}")
    return found


def whole(found: list[Search]) -> Tree:
    """Alternatives that match the whole text, as the field `regex` means them."""
    return _either([one.inside for one in found])


def searched(found: list[Search]) -> Tree:
    """Alternatives that match anywhere in the text, as JSON Schema means them."""
    anything = Times(ANY, 0, None)
    return _either(
        [
            Sequence(
                (
                    *(() if one.at_start else (anything,)),
                    one.inside,
                    *(() if one.at_end else (anything,)),
                )
            )
            for one in found
        ]
    )


def size(tree: Tree) -> int:
    """How many characters stand in the tree once repetitions are written out."""
    if isinstance(tree, Characters):
        return 1
    if isinstance(tree, Times):
        return size(tree.inside) * max(1, tree.least, tree.most or 0)
    return 1 + sum(map(size, tree.parts if isinstance(tree, Sequence) else tree.branches))


def limited(tree: Tree, allowed: tuple[Range, ...]) -> Tree:
    """The tree without the characters that are not in `allowed`.

    Raises:
        UnknownSyntax: a place where none is left.
    """
    if isinstance(tree, Characters):
        found = intersection(tree.ranges, allowed)
        if not found:
            raise UnknownSyntax("a character that must be escaped there is not supported")
        return Characters(found)
    if isinstance(tree, Times):
        return Times(limited(tree.inside, allowed), tree.least, tree.most)
    if isinstance(tree, Sequence):
        return Sequence(tuple(limited(part, allowed) for part in tree.parts))
    return Choice(tuple(limited(branch, allowed) for branch in tree.branches))


def intersection(some: tuple[Range, ...], others: tuple[Range, ...]) -> tuple[Range, ...]:
    """Of two sorted lists of ranges."""
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return tuple(sorted((low, high) for low, high in pairs if low <= high))


def complement(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """All other code points."""
    found, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            found.append((at, low - 1))
        at = max(at, high + 1)
    if at <= LAST:
        found.append((at, LAST))
    return tuple(found)


def _either(trees: list[Tree]) -> Tree:
    return trees[0] if len(trees) == 1 else Choice(tuple(trees))


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def whole(self) -> list[Search]:
        found = []
        while True:
            at_start = self._took("^")
            inside = self._sequence(0)
            found.append(Search(inside, at_start, self._took("$")))
            if not self._took("|"):
                break
        if self.at < len(self.text):
            raise self._unknown(self.text[self.at])
        return found

    def _unknown(self, what: str) -> UnknownSyntax:
        return UnknownSyntax(f"{what!r} is not supported in this place of a pattern")

    def _peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def _took(self, text: str) -> bool:
        found = self._peek(text)
        self.at += len(text) * found
        return found

    def _choice(self, depth: int) -> Tree:
        branches = [self._sequence(depth)]
        while self._took("|"):
            branches.append(self._sequence(depth))
        return _either(branches)

    def _sequence(self, depth: int) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)$":
            parts.append(self._repeated(self._item(depth)))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _item(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise UnknownSyntax(f"groups are nested deeper than {MAX_DEPTH}")
        if self._took("(?:") or (not self._peek("(?") and self._took("(")):
            inside = self._choice(depth + 1)
            if not self._took(")"):
                raise UnknownSyntax("a group does not end, or has an anchor in it")
            return inside
        if self._took("["):
            return self._class()
        if self._took("."):
            return Characters(complement(_LINE_ENDS))
        if self._took("\\"):
            return Characters(self._escape())
        char = self.text[self.at]
        if char in "^*+?{}])(":
            raise self._unknown(self.text[self.at : self.at + 3])
        self.at += 1
        return Characters(((ord(char), ord(char)),))

    def _repeated(self, item: Tree) -> Tree:
        counted = _COUNT.match(self.text, self.at)
        if counted is not None:
            self.at = counted.end()
            least = int(counted[1])
            most = (int(counted[3]) if counted[3] else None) if counted[2] else least
            if most is not None and most < least:
                raise UnknownSyntax(f"{counted[0]} is empty")
        else:
            mark = self.text[self.at : self.at + 1]
            if not mark or mark not in _MARKS:
                return item
            self.at += 1
            least, most = _MARKS[mark]
        item = Times(item, least, most)
        # A lazy repetition matches the same texts.
        if not self._took("?") and self.text[self.at : self.at + 1] in ("*", "+", "{"):
            raise UnknownSyntax("a repetition of a repetition is not supported")
        return item

    def _class(self) -> Tree:
        negated = self._took("^")
        ranges: list[Range] = []
        short = False
        while not self._took("]"):
            short = short or re.match(r"\\[dDwWsS]", self.text[self.at :]) is not None
            first = self._bound()
            if self._peek("-") and not self._peek("-]"):
                self.at += 1
                last = self._bound()
                if len(first) != 1 or len(last) != 1 or first[0][0] > last[0][0]:
                    raise UnknownSyntax("a range in a character class is not supported")
                first = ((first[0][0], last[0][0]),)
            ranges += first
        found = complement(tuple(ranges))
        if not negated:
            found = complement(found)
        elif short:
            found = _ascii_only(found)
        if not ranges or not found:
            raise UnknownSyntax("an empty character class is not supported")
        return Characters(found)

    def _bound(self) -> tuple[Range, ...]:
        if self.at >= len(self.text):
            raise UnknownSyntax("a character class does not end")
        if self._took("\\"):
            return self._escape()
        char = self.text[self.at]
        # Other dialects have operators and nested classes.
        if char == "[" or self.text[self.at : self.at + 2] in ("&&", "--", "~~"):
            raise self._unknown(char)
        self.at += 1
        return ((ord(char), ord(char)),)

    def _escape(self) -> tuple[Range, ...]:
        code = _CODE.match(self.text, self.at)
        if code is not None:
            self.at = code.end()
            point = int(code[1] or code[2] or code[3], 16)
            if point > LAST or 0xD800 <= point <= 0xDFFF:
                raise UnknownSyntax(f"\\{code[0]} is not a character")
            return ((point, point),)
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char.lower() in _SHORT and char:
            found = _SHORT[char.lower()]
            return found if char.islower() else _ascii_only(complement(found))
        if char in _CONTROL:
            return ((_CONTROL[char], _CONTROL[char]),)
        if not char or char.isalnum() or char == "_" or ord(char) > 126:
            raise UnknownSyntax(f"the escape \\{char} is not supported")
        return ((ord(char), ord(char)),)


def _ascii_only(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """What is no digit, letter or space in any dialect: some know more of them than ASCII has."""
    return intersection(ranges, ((0, 127),))
