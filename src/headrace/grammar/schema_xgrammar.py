"""JSON Schema for xgrammar, which enforces some keywords, and silently ignores the others.

Takes a schema that `schema.prepare` has checked and rewritten, and writes it anew from the few
shapes whose reading was verified: any value; a list of constants; a reference; a choice; one type
with keywords of that type. What has no such shape is refused with its place. Objects whose
`properties` are listed have no others, unless `additionalProperties` says so. Pure.
"""

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from headrace.grammar import regex
from headrace.grammar.refusal import Refused, step
from headrace.grammar.schema import Node

# What a string of JSON can hold without an escape.
PLAIN = regex.complement(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)))
# What the engine takes seconds to compile.
MAX_COUNT = 1000
MAX_CONSTANTS = 5000
MAX_COUNTED = 20
MAX_PROPERTIES = 300
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]"
# The engine's own formats let some invalid values pass.
_FORMATS = {
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "uuid": f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$",
}
# Bounds, and how those of integers become whole.
_ROUND = {
    "minimum": math.ceil,
    "maximum": math.floor,
    "exclusiveMinimum": math.floor,
    "exclusiveMaximum": math.ceil,
}
_RANGE = tuple(_ROUND)
# Bounds nearer to each other are confused.
_NEAR = 1e-4
_KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": (*_RANGE, "multipleOf"),
    "array": ("items", "additionalItems", "prefixItems", "minItems", "maxItems"),
    "object": (
        "properties", "required", "patternProperties", "additionalProperties",
        "minProperties", "maxProperties",
    ),
}  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_EVERY_TYPE = ["null", "boolean", "number", "string", "array", "object"]
_BESIDE = frozenset(["$defs", "definitions", "x-guidance"])


def rewrite(schema: Node, field: str, at: str = "") -> Node:
    """The schema that stands at the JSON Pointer `at`, in the shapes that are enforced.

    Raises:
        Refused: names the place.
    """
    writer = _Writer(schema, field, at)
    top = writer.write(schema, at)
    return {**top, "$defs": writer.shared} if writer.shared else top


class _Writer:
    """Writes one schema; targets of references once each, under names of its own."""

    def __init__(self, root: Node, field: str, at: str) -> None:
        self.root = root
        self.field = field
        self.at = at
        self.shared: dict[str, Node] = {}
        self._names: dict[int, str] = {}

    def refuse(self, pointer: str, why: str) -> Refused:
        return Refused(self.field, f"{why} with the grammar backend xgrammar", f"#{pointer}")

    def write(self, node: Any, pointer: str) -> Node:
        if isinstance(node, bool):
            if not node:
                raise self.refuse(pointer, "a schema that nothing fits is not supported")
            return {}
        own = {name: value for name, value in node.items() if name not in _BESIDE}
        for name, method in _WHOLE.items():
            if name in own:
                self._alone(own, name, pointer)
                return method(self, own, pointer)
        named = own.pop("type", None)
        types = [named] if isinstance(named, str) else named
        if not own and types is None:
            return {}
        written = [self._typed(kind, own, pointer) for kind in types or _EVERY_TYPE]
        return written[0] if len(written) == 1 else {"anyOf": written}

    # -- shapes that stand alone --------------------------------------------------------------

    def _alone(self, node: Node, name: str, pointer: str) -> None:
        """Nothing that counts stands next to the keyword `name`."""
        allowed = {name, "type"} if name in ("enum", "const") else {name}
        for other in node:
            if other not in allowed:
                why = f"{other!r} next to {name!r} is not supported"
                raise self.refuse(step(pointer, other), why)

    def _constants(self, node: Node, pointer: str) -> Node:
        values = [node["const"]] if "const" in node else node["enum"]
        named = node.get("type", _EVERY_TYPE)
        types = [named] if isinstance(named, str) else named
        if len(values) > MAX_CONSTANTS:
            why = f"a list of more than {MAX_CONSTANTS} is not supported"
            raise self.refuse(step(pointer, "enum"), why)
        fitting = [value for value in values if any(_is(value, kind) for kind in types)]
        if not fitting:
            raise self.refuse(pointer, "constants that are not of the type are not supported")
        return {"enum": fitting}

    def _reference(self, node: Node, pointer: str) -> Node:
        path = unquote(node["$ref"][1:])
        target: Any = self.root
        for part in path.split("/")[1:]:
            key: Any = part.replace("~1", "/").replace("~0", "~")
            target = target[int(key) if isinstance(target, list) else key]
        name = self._names.get(id(target)) if isinstance(target, dict) else None
        if name is None:
            name = f"d{len(self.shared)}"
            self.shared[name] = {}
            if isinstance(target, dict):
                self._names[id(target)] = name
            self.shared[name] = self.write(target, self.at + path)
        return {"$ref": f"#/$defs/{name}"}

    def _choice(self, node: Node, pointer: str) -> Node:
        place = step(pointer, "anyOf")
        return {"anyOf": [self.write(one, step(place, i)) for i, one in enumerate(node["anyOf"])]}

    def _all(self, node: Node, pointer: str) -> Node:
        place = step(pointer, "allOf")
        if len(node["allOf"]) > 1:
            raise self.refuse(place, "'allOf' with several schemas is not supported")
        return self.write(node["allOf"][0], step(place, 0))

    # -- one type -----------------------------------------------------------------------------

    def _typed(self, kind: str, node: Node, pointer: str) -> Node:
        keywords = _KEYWORDS.get("number" if kind == "integer" else kind, ())
        own = {name: node[name] for name in keywords if name in node}
        for name in _COUNTS:
            if own.get(name, 0) > MAX_COUNT:
                raise self.refuse(
                    step(pointer, name), f"a count above {MAX_COUNT} is not supported"
                )
        written: Node = {"type": kind}
        method = _TYPES.get(kind)
        return written | (method(self, own, pointer) if method else own)

    def _string(self, node: Node, pointer: str) -> Node:
        name = next((name for name in ("pattern", "format") if name in node), None)
        if name is not None and len(node) > 1:
            raise self.refuse(step(pointer, name), f"{name!r} next to others is not supported")
        if "format" in node and node["format"] not in _FORMATS:
            why = f"the format {node['format']!r} is not supported"
            raise self.refuse(step(pointer, "format"), why)
        pattern = node.get("pattern") or _FORMATS.get(node.get("format", ""))
        if pattern is None:
            return node
        return {"pattern": self._pattern(pattern, step(pointer, "pattern"))}

    def _pattern(self, pattern: str, place: str) -> str:
        """The engine matches the whole string, the standard anywhere in it."""
        try:
            tree = regex.searched(regex.parse(pattern))
            return f"^{plain(regex.limited(tree, PLAIN))}$"
        except regex.UnknownSyntax as error:
            raise self.refuse(place, str(error)) from None

    def _number(self, node: Node, pointer: str) -> Node:
        if "multipleOf" in node:
            raise self.refuse(
                step(pointer, "multipleOf"), "'multipleOf' of numbers is not supported"
            )
        bounds = {name: node[name] for name in _RANGE if name in node}
        for name, value in bounds.items():
            others = [other for other in bounds.values() if other != value]
            near = min([abs(value) or 1, *(abs(value - other) for other in others)])
            if near < _NEAR or abs(value) >= 2**53:
                why = (
                    f"a bound within {_NEAR} of 0 or of another, or beyond 2**53, is not supported"
                )
                raise self.refuse(step(pointer, name), why)
        return node

    def _integer(self, node: Node, pointer: str) -> Node:
        unit = node.get("multipleOf", 1)
        if unit != 1 and (len(node) > 1 or int(unit) != unit or unit >= 2**31):
            why = "'multipleOf' next to a bound, or with a fraction, is not supported"
            raise self.refuse(step(pointer, "multipleOf"), why)
        bounds = {name: node[name] for name in _RANGE if name in node}
        self._number(bounds, pointer)
        whole = {name: _ROUND[name](value) for name, value in bounds.items()}
        return whole if unit == 1 else {"multipleOf": int(unit)}

    def _array(self, node: Node, pointer: str) -> Node:
        rest, first = node.get("items", True), node.get("prefixItems", [])
        spot, place = step(pointer, "items"), step(pointer, "prefixItems")
        if isinstance(rest, list):
            rest, first = node.get("additionalItems", True), rest
            spot, place = step(pointer, "additionalItems"), spot
        counts = {name: node[name] for name in ("minItems", "maxItems") if name in node}
        if not first:
            return counts | ({"items": self.write(rest, spot)} if rest else {"maxItems": 0})
        if counts.get("maxItems", len(first)) < len(first):
            raise self.refuse(step(pointer, "maxItems"), "fewer items than listed is not supported")
        listed = [self.write(one, step(place, i)) for i, one in enumerate(first)]
        return counts | {
            "prefixItems": listed,
            "items": self.write(rest, spot) if rest else False,
        }

    def _object(self, node: Node, pointer: str) -> Node:
        listed, patterns = node.get("properties", {}), node.get("patternProperties", {})
        more = node.get("additionalProperties", not (listed or patterns))
        for name in node.get("required", []):
            if name not in listed:
                why = f"{name!r}, which is not in properties, is not supported"
                raise self.refuse(step(pointer, "required"), why)
        if patterns and (listed or more or len(patterns) > 1):
            why = "'patternProperties' with others, or next to other properties, is not supported"
            raise self.refuse(step(pointer, "patternProperties"), why)
        if listed and more:
            # A listed name, written with an escape, would be taken for another one.
            why = "other properties than those listed are not supported"
            raise self.refuse(step(pointer, "additionalProperties"), why)
        counts = [name for name in ("minProperties", "maxProperties") if name in node]
        if counts and len(listed) > MAX_COUNTED:
            why = f"{counts[0]!r} next to more than {MAX_COUNTED} properties is not supported"
            raise self.refuse(step(pointer, counts[0]), why)
        place = step(pointer, "properties")
        if len(listed) > MAX_PROPERTIES:
            raise self.refuse(place, f"an object of more than {MAX_PROPERTIES} is not supported")
        return {name: node[name] for name in counts} | {
            "properties": {
                name: self.write(one, step(place, name)) for name, one in listed.items()
            },
            "required": list(dict.fromkeys(node.get("required", []))),
            "patternProperties": self._patterns(patterns, step(pointer, "patternProperties")),
            "additionalProperties": more
            and self.write(more, step(pointer, "additionalProperties")),
        }

    def _patterns(self, patterns: Node, place: str) -> Node:
        return {
            self._pattern(name, step(place, name)): self.write(one, step(place, name))
            for name, one in patterns.items()
        }


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value == int(value))
    if isinstance(value, str):
        return kind == "string"
    return kind == ("array" if isinstance(value, list) else "object")


def plain(tree: regex.Tree) -> str:
    """A tree as a regular expression, in the plainest syntax."""
    if isinstance(tree, regex.Characters):
        return f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in tree.ranges)}]"
    if isinstance(tree, regex.Times) and isinstance(tree.inside, regex.Characters):
        return f"{plain(tree.inside)}{tree.mark}"
    if isinstance(tree, regex.Times) and tree.mark == "?":
        # The engine forgets the beginning of an optional group that ends with a repetition.
        return f"(?:{plain(tree.inside)}|)"
    if isinstance(tree, regex.Times):
        return f"(?:{plain(tree.inside)}){tree.mark}"
    if isinstance(tree, regex.Sequence):
        return "".join(f"(?:{plain(part)})" for part in tree.parts)
    return "|".join(f"(?:{plain(branch)})" for branch in tree.branches)


def _code(point: int) -> str:
    return f"\\u{{{point:X}}}"


_WHOLE: dict[str, Callable[[_Writer, Node, str], Node]] = {
    "enum": _Writer._constants,
    "const": _Writer._constants,
    "$ref": _Writer._reference,
    "anyOf": _Writer._choice,
    "allOf": _Writer._all,
}
_TYPES: dict[str, Callable[[_Writer, Node, str], Node]] = {
    "string": _Writer._string,
    "number": _Writer._number,
    "integer": _Writer._integer,
    "array": _Writer._array,
    "object": _Writer._object,
}
