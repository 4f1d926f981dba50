"""Structural tags: free text with constrained parts, in the engine's Lark notation.

Two forms: SGLang's `{"structures": [{begin, schema, end}], "triggers": [...]}`, and a tree of
`{"type": "structural_tag", "format": ...}`:

    const_string {value}      json_schema {json_schema}      regex {pattern}      grammar {grammar}
    any_text                  at the very end, or as the content of a tag that has an end
    sequence {elements}       or {elements}                  tag {begin, content, end}
    triggered_tags {triggers, tags, at_least_one, stop_after_first}
    tags_with_separator {tags, separator, at_least_one, stop_after_first}

`at_least_one` means that a tag comes first. Special tokens never match free text; where a `begin`,
`end` or value is written as one, that token is required. Pure; a place is a JSON Pointer.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from headrace.grammar import ebnf, schema
from headrace.grammar.refusal import Refused, step

FIELD = "structural_tag"
MAX_TAGS = 1000
_TEXT = r"/(?s:.)*/"
_NO_TEXT = '""'

Format = dict[str, Any]


def to_lark(text: str, specials: Mapping[str, int]) -> str:
    """The whole grammar. `specials`: special tokens by their text.

    Raises:
        Refused: not one of the forms above; names the place.
    """
    writer = _Writer(specials)
    start = writer.write(*read(text), last=True)
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.rules])


def read(text: str) -> tuple[Any, str]:
    """(the tree of formats, its place); the older form as a tree. Raises `Refused`."""
    value = schema.parse(text, FIELD)
    schema.check_depth(value, FIELD)
    if not isinstance(value, dict):
        raise Refused(FIELD, "must be an object")
    if "structures" in value:
        return _modern(value), ""
    if "format" in value:
        return value["format"], "/format"
    raise Refused(FIELD, "needs 'format', or 'structures' and 'triggers'")


def _modern(value: Format) -> Format:
    """The older form as a tree."""
    structures, triggers = value["structures"], value.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise Refused(FIELD, "must be a non-empty array", "/structures")
    tags = []
    for index, item in enumerate(structures):
        if not isinstance(item, dict) or "schema" not in item:
            raise Refused(FIELD, "must have begin, schema and end", f"/structures/{index}")
        content = {"type": "json_schema", "json_schema": item["schema"]}
        tags.append({"begin": item.get("begin"), "content": content, "end": item.get("end")})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Writer:
    """Turns a tree into one expression and the rules it needs."""

    def __init__(self, specials: Mapping[str, int]) -> None:
        self.specials = specials
        self.rules: list[str] = []
        names = sorted((name for name in specials if name), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names))) if names else None

    def write(self, node: Any, at: str, *, last: bool = False) -> str:
        """The expression of a format; `last`: nothing follows it."""
        kind = node.get("type") if isinstance(node, dict) else None
        method = _WRITERS.get(kind) if isinstance(kind, str) else None
        if method is None:
            known = ", ".join(sorted(_WRITERS))
            raise Refused(FIELD, f"the type must be one of {known}", step(at, "type"))
        return method(self, node, at, last)

    # -- leaves -------------------------------------------------------------------------------

    def any_text(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at)
        if not last:
            raise Refused(FIELD, "any_text must come last, or be the content of a tag", at)
        return self._define(_TEXT)

    def const_string(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "value")
        return self.literal(self._string(node, "value", at))

    def json_schema(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "json_schema")
        place = step(at, "json_schema")
        if "json_schema" not in node:
            raise Refused(FIELD, "is missing", place)
        return "%json " + json.dumps(schema.prepare_value(node["json_schema"], FIELD, place))

    def regex(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "pattern")
        return regex_literal(self._string(node, "pattern", at))

    def grammar(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "grammar")
        text = self._string(node, "grammar", at)
        start, rules = ebnf.to_lark(text, FIELD, prefix=f"g{len(self.rules)}_")
        self.rules += rules
        return start

    # -- combinations -------------------------------------------------------------------------

    def sequence(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "elements")
        items = self._list(node, "elements", at)
        place, end = step(at, "elements"), len(items) - 1
        parts = [
            self.write(item, step(place, i), last=last and i == end) for i, item in enumerate(items)
        ]
        return f"({' '.join(parts)})"

    def either(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "elements")
        place = step(at, "elements")
        items = self._list(node, "elements", at)
        parts = [self.write(item, step(place, i), last=last) for i, item in enumerate(items)]
        return f"({' | '.join(parts)})"

    def tag(self, node: Format, at: str, last: bool) -> str:
        return self._tag(node, at, self.literal(self._string(node, "begin", at)), last)

    def triggered_tags(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "triggers", "tags", "at_least_one", "stop_after_first", "excludes")
        if node.get("excludes"):
            raise Refused(FIELD, "excludes are not supported", step(at, "excludes"))
        if not last:
            raise Refused(FIELD, "triggered_tags must come last", at)
        tags, place = self._list(node, "tags", at), step(at, "tags")
        triggers = self._triggers(node, at)
        bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        whole = []
        for index, item in enumerate(tags):
            spot = step(place, index)
            begin = self._string(item, "begin", spot)
            fitting = [trigger for trigger in triggers if begin.startswith(trigger)]
            if len(fitting) != 1:
                why = f"begins with {len(fitting)} of the triggers; it must be one"
                raise Refused(FIELD, why, step(spot, "begin"))
            rest = self.literal(begin[len(fitting[0]) :])
            bodies[fitting[0]].append(self._define(self._tag(item, spot, rest, False)))
            whole.append(f"{self.literal(fitting[0])} {bodies[fitting[0]][-1]}")
        found = [
            self._define(f"{self._head(trigger, at)} ({' | '.join(parts)})")
            for trigger, parts in bodies.items()
            if parts
        ]
        later, first = f"({' | '.join(found)})", f"({' | '.join(whole)})"
        text = self._define(_TEXT)
        once, must = self._flag(node, "stop_after_first", at), self._flag(node, "at_least_one", at)
        if must:
            return first if once else f"({first} {later}* {text})"
        return f"({text} | {later})" if once else f"({later}* {text})"

    def tags_with_separator(self, node: Format, at: str, last: bool) -> str:
        self._only(node, at, "tags", "separator", "at_least_one", "stop_after_first")
        tags, place = self._list(node, "tags", at), step(at, "tags")
        parts = [self.tag(item, step(place, i), False) for i, item in enumerate(tags)]
        one = self._define(f"({' | '.join(parts)})")
        separator = self.literal(self._string(node, "separator", at))
        once, must = self._flag(node, "stop_after_first", at), self._flag(node, "at_least_one", at)
        many = one if once else f"({one} ({separator} {one})*)"
        return many if must else f"({many})?"

    # -- parts --------------------------------------------------------------------------------

    def literal(self, text: str) -> str:
        """Text as Lark: strings, and special tokens by their ids."""
        parts, at = [], 0
        for match in self._split.finditer(text) if self._split else ():
            if match.start() > at:
                parts.append(ebnf.literal(text[at : match.start()]))
            parts.append(f"<[{self.specials[match[0]]}]>")
            at = match.end()
        if at < len(text):
            parts.append(ebnf.literal(text[at:]))
        return " ".join(parts) or _NO_TEXT

    def _tag(self, node: Any, at: str, begin: str, last: bool) -> str:
        """A tag whose `begin` (or what is left of it) is written already."""
        if not isinstance(node, dict) or node.get("type", "tag") != "tag":
            raise Refused(FIELD, "must be a tag", at)
        self._only(node, at, "begin", "content", "end")
        end = self._string(node, "end", at)
        content, place = node.get("content"), step(at, "content")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            self._only(content, place)
            return f"{begin} {self._until(end)}"
        inside = self.write(content, place, last=last and not end)
        return f"{begin} {inside} {self.literal(end)}"

    def _until(self, end: str) -> str:
        """Any text up to and with `end`."""
        if self._has_special(end):
            return f"{self._define(_TEXT)} {self.literal(end)}"
        return self._define(f"{_TEXT} {self.literal(end)}", lazy=True)

    def _head(self, trigger: str, at: str) -> str:
        """Any text up to and with the first occurrence of a trigger."""
        parts = self.literal(trigger)
        if parts.startswith("<["):
            return f"{self._define(_TEXT)} {parts}"
        if self._has_special(trigger):
            why = "a trigger must not have text before a special token"
            raise Refused(FIELD, why, step(at, "triggers"))
        return self._define(f"{_TEXT} {parts}", lazy=True)

    def _has_special(self, text: str) -> bool:
        return self._split is not None and self._split.search(text) is not None

    def _define(self, expression: str, *, lazy: bool = False) -> str:
        """A rule of its own for an expression."""
        name = f"s{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {expression}")
        return name

    def _triggers(self, node: Format, at: str) -> list[str]:
        triggers = node.get("triggers")
        if (
            not isinstance(triggers, list)
            or not triggers
            or not all(isinstance(trigger, str) and trigger for trigger in triggers)
        ):
            raise Refused(FIELD, "must be a non-empty array of strings", step(at, "triggers"))
        return list(dict.fromkeys(triggers))

    def _string(self, node: Any, name: str, at: str) -> str:
        value = node.get(name) if isinstance(node, dict) else None
        if not isinstance(value, str):
            raise Refused(FIELD, "must be a string", step(at, name))
        return value

    def _flag(self, node: Format, name: str, at: str) -> bool:
        value = node.get(name, False)
        if not isinstance(value, bool):
            raise Refused(FIELD, "must be true or false", step(at, name))
        return value

    def _list(self, node: Format, name: str, at: str) -> list[Any]:
        value = node.get(name)
        if not isinstance(value, list) or not 0 < len(value) <= MAX_TAGS:
            raise Refused(FIELD, f"must be an array of 1 to {MAX_TAGS}", step(at, name))
        return value

    def _only(self, node: Format, at: str, *names: str) -> None:
        """Nothing is ignored: other members are refused."""
        for name in node:
            if name not in names and name != "type":
                raise Refused(FIELD, "is not supported here", step(at, name))


def regex_literal(pattern: str) -> str:
    """A regular expression between slashes."""
    escaped = re.sub(
        r"\\.|/|\n",
        lambda match: {"/": r"\/", "\n": r"\n"}.get(match[0], match[0]),
        pattern,
        flags=re.DOTALL,
    )
    return f"/{escaped}/"


_WRITERS = {
    "any_text": _Writer.any_text,
    "const_string": _Writer.const_string,
    "json_schema": _Writer.json_schema,
    "regex": _Writer.regex,
    "grammar": _Writer.grammar,
    "sequence": _Writer.sequence,
    "or": _Writer.either,
    "tag": _Writer.tag,
    "triggered_tags": _Writer.triggered_tags,
    "tags_with_separator": _Writer.tags_with_separator,
}
