"""EBNF grammars (`root ::= "a" | b`, the notation of GBNF) in the engine's Lark notation.

    rule        name ::= alternatives             the first symbol is `root`; # starts a comment
    alternative items, side by side               may be empty
    item        "text"  [a-z]  [^a-z]  .  name  ( ... )   then perhaps  *  +  ?  {m}  {m,}  {m,n}
    escapes     \\n \\r \\t \\\\ \\" \\' \\[ \\] \\- \\^ \\/ \\xHH \\uHHHH \\UHHHHHHHH

A rule ends where the next one begins. Rules that do not refer to themselves become regular
expressions, which are matched exactly. In the others the longest match of each expression is taken.
Pure.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from headrace.grammar.refusal import Refused

MAX_DEPTH = 100
# The set of all characters, as a regular expression.
ANY = "(?s:.)"
_TOKEN = re.compile(
    r"""(?P<space>(?:[\s]|\#[^\n]*)+)|(?P<rule>[\w-]+)(?=\s*::=)|(?P<name>[\w-]+)|(?P<is>::=)"""
    r"""|(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<set>\[\^?(?:[^\]\\\n]|\\.)*\])"""
    r"""|(?P<count>\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<mark>[.|()*+?])""",
    re.VERBOSE,
)
_CHARACTER = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "\\\"'[]-^/"}
_MOST_PASSES = 50

# ("text", str) ("set", regex) ("name", str) ("all", [node]) ("any", [node]) ("times", node, how)
Node = tuple[Any, ...]


@dataclass
class _Token:
    kind: str
    text: str
    line: int


def to_lark(text: str, field: str = "ebnf", prefix: str = "") -> tuple[str, list[str]]:
    """(the start symbol, rules in Lark); every symbol begins with `prefix`. Raises `Refused`."""
    rules = read(text, field)
    regular = _regular({name: set(_names(node)) for name, (node, _) in rules.items()})
    symbols = {
        name: (f"{prefix}T{number}".upper() if name in regular else f"{prefix}r{number}".lower())
        for number, name in enumerate(rules)
    }
    lines = [f"{symbols[name]}: {_write(node, symbols)}" for name, (node, _) in rules.items()]
    return symbols["root"], lines


def read(text: str, field: str) -> dict[str, tuple[Node, str]]:
    """Every rule with the line where it begins.

    Raises:
        Refused: not in the notation above, or a name without a rule; names the line.
    """
    rules = _Parser(text, field).rules()
    if "root" not in rules:
        raise Refused(field, "there is no rule named root")
    for name, (node, line) in rules.items():
        for other in _names(node):
            if other not in rules:
                raise Refused(field, f"the rule {name} uses {other}, which is not defined", line)
    if not _ends(rules):
        raise Refused(field, "the rule root never ends", rules["root"][1])
    return rules


def literal(text: str) -> str:
    """Text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


class _Parser:
    """Recursive descent over the tokens of one grammar."""

    def __init__(self, text: str, field: str) -> None:
        self.field = field
        self.tokens = list(self._scan(text))
        self.at = 0

    def _scan(self, text: str) -> "list[_Token]":
        found, at, line = [], 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise Refused(self.field, f"cannot read {text[at : at + 20]!r}", f"line {line}")
            assert match.lastgroup is not None
            if match.lastgroup != "space":
                found.append(_Token(match.lastgroup, match[0], line))
            line += match[0].count("\n")
            at = match.end()
        found.append(_Token("end", "", line))
        return found

    def rules(self) -> dict[str, tuple[Node, str]]:
        found: dict[str, tuple[Node, str]] = {}
        while self.next.kind != "end":
            token = self._take("rule")
            if token.text in found:
                self._fail(token, f"the rule {token.text} is defined twice")
            self._take("is")
            found[token.text] = (self._alternatives(0), f"line {token.line}")
        return found

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def _take(self, kind: str) -> _Token:
        token = self.next
        if token.kind != kind:
            self._fail(token, f"expected a {kind}, found {token.text or 'the end'!r}")
        self.at += 1
        return token

    def _fail(self, token: _Token, why: str) -> NoReturn:
        raise Refused(self.field, why, f"line {token.line}")

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._fail(self.next, f"groups are nested deeper than {MAX_DEPTH}")
        found = [self._sequence(depth)]
        while self.next.text == "|" and self.next.kind == "mark":
            self.at += 1
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else ("any", found)

    def _sequence(self, depth: int) -> Node:
        found: list[Node] = []
        while (item := self._item(depth)) is not None:
            while (how := self._repetition()) is not None:
                item = ("times", item, how)
            found.append(item)
        return found[0] if len(found) == 1 else ("all", found)

    def _item(self, depth: int) -> Node | None:
        token = self.next
        if token.kind not in ("text", "set", "name", "mark") or token.text in ("|", ")"):
            return None
        self.at += 1
        if token.kind == "text":
            return ("text", "".join(self._characters(token, token.text[1:-1])))
        if token.kind == "set":
            return ("set", self._set(token))
        if token.kind == "name":
            return ("name", token.text)
        if token.text == ".":
            return ("set", ANY)
        if token.text != "(":
            self._fail(token, f"nothing to repeat before {token.text}")
        inside = self._alternatives(depth + 1)
        if self.next.text != ")":
            self._fail(self.next, "a group does not end")
        self.at += 1
        return inside

    def _repetition(self) -> str | None:
        token = self.next
        if token.kind == "count":
            self.at += 1
            low, _, high = re.sub(r"\s", "", token.text)[1:-1].partition(",")
            if high and int(high) < int(low):
                self._fail(token, f"{token.text} is empty")
            return re.sub(r"\s", "", token.text)
        if token.kind == "mark" and token.text in "*+?":
            self.at += 1
            return token.text
        return None

    def _characters(self, token: _Token, text: str) -> list[str]:
        """One string per character, escapes resolved."""
        found = []
        for two, four, eight, other, plain in _CHARACTER.findall(text):
            if code := two or four or eight:
                found.append(self._character(token, int(code, 16)))
            elif other and other not in _ESCAPES:
                self._fail(token, f"the escape \\{other} is not known")
            else:
                found.append(_ESCAPES[other] if other else plain)
        return found

    def _character(self, token: _Token, code: int) -> str:
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self._fail(token, f"U+{code:X} is not a character")
        return chr(code)

    def _set(self, token: _Token) -> str:
        """A character set as a regular expression, every bound as a code point."""
        negated = token.text.startswith("[^")
        inside = token.text[2 if negated else 1 : -1]
        # An escaped "-" is a character, a bare one between two characters makes a range.
        marks = [m.group() == "-" for m in _CHARACTER.finditer(inside)]
        chars = self._characters(token, inside)
        if not chars:
            self._fail(token, "a character set is empty")
        parts, at = [], 0
        while at < len(chars):
            low = high = ord(chars[at])
            if at + 2 < len(chars) and marks[at + 1]:
                high = ord(chars[at + 2])
                at += 2
            if high < low:
                self._fail(token, f"the range {chr(low)}-{chr(high)} is empty")
            parts.append(f"\\x{{{low:X}}}-\\x{{{high:X}}}")
            at += 1
        return f"[{'^' if negated else ''}{''.join(parts)}]"


def _names(node: Node) -> list[str]:
    """Every rule that a node uses."""
    if node[0] == "name":
        return [node[1]]
    if node[0] == "times":
        return _names(node[1])
    if node[0] in ("all", "any"):
        return [name for child in node[1] for name in _names(child)]
    return []


def _regular(uses: dict[str, set[str]]) -> set[str]:
    """The rules from which no cycle can be reached."""
    waiting = {name: set(others) for name, others in uses.items()}
    users: dict[str, list[str]] = {name: [] for name in uses}
    for name, others in uses.items():
        for other in others:
            users[other].append(name)
    ready = [name for name, others in waiting.items() if not others]
    done: set[str] = set()
    while ready:
        name = ready.pop()
        done.add(name)
        for user in users[name]:
            waiting[user].discard(name)
            if not waiting[user] and user not in done:
                ready.append(user)
    return done


def _ends(rules: dict[str, tuple[Node, str]]) -> bool:
    """Whether the root has a sentence; True when that takes too long to tell."""
    known: set[str] = set()
    for _ in range(_MOST_PASSES):
        before = len(known)
        for name in [*rules, *reversed(rules)]:
            if name not in known and _can_end(rules[name][0], known):
                known.add(name)
        if "root" in known or len(known) == before:
            return "root" in known
    return True


def _can_end(node: Node, known: set[str]) -> bool:
    """Whether a node has a sentence, given the rules that have one."""
    if node[0] == "name":
        return node[1] in known
    if node[0] == "times":
        return node[2][0] in "*?" or node[2].startswith("{0") or _can_end(node[1], known)
    if node[0] in ("all", "any"):
        return (all if node[0] == "all" else any)(_can_end(child, known) for child in node[1])
    return True


def _write(node: Node, symbols: dict[str, str]) -> str:
    kind = node[0]
    if kind == "text":
        return literal(node[1])
    if kind == "set":
        return f"/{node[1]}/"
    if kind == "name":
        return symbols[node[1]]
    if kind == "times":
        return f"({_write(node[1], symbols)}){node[2]}"
    if kind == "any":
        return "(" + " | ".join(_write(child, symbols) for child in node[1]) + ")"
    return "(" + " ".join(_write(child, symbols) for child in node[1]) + ")" if node[1] else '""'
