"""JSON Schema: checks every keyword that counts, and writes the schema as the engine reads it.

Reads draft 2020-12, 2019-09 and 7. A keyword is enforced, or it is an annotation of the standard,
or the schema is refused with a JSON Pointer; nothing is ignored. Only what can be reached from the
root counts: unused definitions may hold anything. Where the engine is laxer than the standard
(dates, patterns, `oneOf`), the schema is rewritten to an equivalent one. Pure.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from headrace.grammar import patterns
from headrace.grammar.refusal import Refused, step
from headrace.grammar.traits import TYPES, Traits

MAX_DEPTH = 100
MAX_NODES = 20_000
# The engine's time to compile grows with the square of an object's properties.
MAX_PROPERTIES_SQUARED = 1_500_000
# At most one space, or one line end with its indentation: output cannot get lost in white space.
WHITESPACE = r"(\x20|\r?\n[\x20\t]{0,64})?"

# Without \\u: a name written with it would not be recognized as one of `properties`. What only \\u
# can write must not be asked for then: the engine would leave it out.
_ESCAPES = 'nrbtf\\"'
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"\\x[01]|\\x7[fF]|\\u00[01]|\\u007[fF]|\\[ux]\{|\\[cv0]")

_ANNOTATIONS = frozenset(
    [
        "$comment", "$defs", "definitions", "title", "description", "default",
        "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
        "externalDocs", "xml",
    ]
)  # fmt: skip
_DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06", "draft-04", "draft-03")
_OLD_DRAFTS = _DRAFTS[2:]
_FORMATS = frozenset(["duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
_INTEGER_FORMATS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
_NUMBER_FORMATS = frozenset(["float", "double"])

Node = dict[str, Any]


def prepare(text: str, field: str = "json_schema") -> Node:
    """The schema in `text`, checked and rewritten for the engine.

    Raises:
        Refused: not JSON, not a schema, or something that cannot be enforced; names the place.
    """
    return prepare_value(parse(text, field), field)


def prepare_value(schema: Any, field: str, at: str = "", *, exclusive: bool = False) -> Node:
    """`prepare` of a parsed schema that stands at the JSON Pointer `at`; changes it in place.

    `exclusive`: whether exclusive bounds stay as they are.
    """
    check_depth(schema, field)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise Refused(field, f"a schema is an object, not {_name(schema)}", f"#{at}")
    rewriter = _Rewriter(schema, field, at, exclusive)
    try:
        rewriter.run()
    except RecursionError:
        raise Refused(field, "is nested too deep") from None
    schema["x-guidance"] = {
        "whitespace_flexible": True,
        "whitespace_pattern": WHITESPACE,
        "lenient": False,
        "coerce_one_of": False,
        **({"json_allowed_escapes": _ESCAPES} if rewriter.open else {}),
    }
    return schema


def parse(text: str, field: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except ValueError as error:
        raise Refused(field, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise Refused(field, "is nested too deep") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def check_depth(value: Any, field: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise Refused(field, f"is nested deeper than {MAX_DEPTH} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value, names included."""
    if isinstance(value, str):
        yield value
    for child in _children(value):
        yield from _texts(child)
    if isinstance(value, dict):
        yield from value


def _name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


class _Rewriter:
    """Walks one schema; every reachable node once."""

    def __init__(self, root: Node, field: str, at: str, exclusive: bool) -> None:
        self.root = root
        self.exclusive = exclusive
        self.field = field
        self.at = at
        self.old_draft = any(name in str(root.get("$schema", "")) for name in _OLD_DRAFTS)
        self.seen: set[int] = set()
        self.properties_squared = 0
        # Whether an object may have others than its listed properties; where \\u would be needed.
        self.open = False
        self.control = ""

    def run(self) -> None:
        self.walk(self.root, self.at)
        if self.open and self.control:
            raise self.refuse(
                self.control,
                "control characters are supported where no object has properties beyond the listed",
            )

    def written(self, text: str, place: str) -> None:
        """Note a text that the output may have to hold."""
        if _CONTROL.search(text):
            self.control = self.control or place

    def refuse(self, pointer: str, why: str) -> Refused:
        return Refused(self.field, why, f"#{pointer}")

    def walk(self, node: Any, pointer: str) -> None:
        """Check and rewrite one subschema and all below it."""
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise self.refuse(pointer, f"a schema is an object or a boolean, not {_name(node)}")
        if id(node) in self.seen:
            return
        self.seen.add(id(node))
        if len(self.seen) > MAX_NODES:
            raise self.refuse(pointer, f"has more than {MAX_NODES} subschemas")
        for keyword in list(node):
            place = step(pointer, keyword)
            if keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
                if keyword not in ("$defs", "definitions"):
                    del node[keyword]
                continue
            handler = _HANDLERS.get(keyword)
            if handler is None:
                raise self.refuse(place, f"the keyword {keyword!r} is not supported")
            handler(self, node, keyword, place)

    # -- one method for each kind of keyword --------------------------------------------------

    def schema(self, node: Node, keyword: str, place: str) -> None:
        self.walk(node[keyword], place)

    def items(self, node: Node, keyword: str, place: str) -> None:
        """One schema, or the old form with a list of them."""
        if not isinstance(node[keyword], list):
            self.walk(node[keyword], place)
        elif "prefixItems" in node:
            raise self.refuse(place, "an array of items next to prefixItems is not supported")
        else:
            self.schemas(node, keyword, place)

    def additional_items(self, node: Node, keyword: str, place: str) -> None:
        if isinstance(node.get("items"), list):
            self.walk(node[keyword], place)
        else:
            # It means nothing without an array of items.
            del node[keyword]

    def schemas(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        if not isinstance(value, list) or (not value and keyword != "items"):
            raise self.refuse(place, "must be a non-empty array of schemas")
        for index, child in enumerate(value):
            self.walk(child, step(place, index))

    def one_of(self, node: Node, keyword: str, place: str) -> None:
        """Where no value fits two branches, `oneOf` is `anyOf`."""
        self.schemas(node, keyword, place)
        branches = node[keyword]
        if len(branches) > 1:
            traits = [Traits(self.follow(branch)) for branch in branches]
            for index, trait in enumerate(traits):
                if not all(trait.excludes(other) for other in traits[:index]):
                    raise self.refuse(
                        place,
                        "oneOf is supported when its branches exclude each other by type or by a "
                        "required property with a constant value; use anyOf",
                    )
        _restrict(node, {"anyOf": node.pop(keyword)})

    def properties(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        if not isinstance(value, dict):
            raise self.refuse(place, "must be an object of schemas")
        self.properties_squared += len(value) ** 2
        if self.properties_squared > MAX_PROPERTIES_SQUARED:
            raise self.refuse(place, "too many properties in one schema")
        self.open = self.open or node.get("additionalProperties") is not False
        for name, child in value.items():
            self.written(name, step(place, name))
            self.walk(child, step(place, name))

    def pattern_properties(self, node: Node, keyword: str, place: str) -> None:
        self.properties(node, keyword, place)
        node[keyword] = {
            self.translated(name, step(place, name)): child for name, child in node[keyword].items()
        }

    def pattern(self, node: Node, keyword: str, place: str) -> None:
        if not isinstance(node[keyword], str):
            raise self.refuse(place, "must be a string")
        node[keyword] = self.translated(node[keyword], place)

    def translated(self, pattern: str, place: str) -> str:
        self.written(pattern if not _CONTROL_ESCAPE.search(pattern) else "\0", place)
        try:
            return patterns.translate(pattern)
        except patterns.UnknownSyntax as error:
            raise self.refuse(place, str(error)) from None

    def format(self, node: Node, keyword: str, place: str) -> None:
        name = node[keyword]
        if name in _FORMATS:
            return
        if not isinstance(name, str):
            raise self.refuse(place, "must be a string")
        kinds = node.get("type")
        if name in patterns.FORMATS:
            _restrict(node, {"pattern": patterns.FORMATS[name]})
        elif name in _INTEGER_FORMATS and kinds == "integer":
            low, high = _INTEGER_FORMATS[name]
            _restrict(node, {"minimum": low, "maximum": high})
        elif name not in _NUMBER_FORMATS or kinds not in ("number", "integer"):
            raise self.refuse(place, f"the format {name!r} is not supported")
        del node[keyword]

    def kind(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in TYPES for name in names):
            raise self.refuse(place, f"must be one or more of {', '.join(sorted(TYPES))}")

    def count(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        if isinstance(value, float) and value.is_integer():
            value = node[keyword] = int(value)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.refuse(place, "must be a whole number from 0 to 2147483647")
        if keyword == "minProperties" and value > max(1, _certain(node)):
            # A name that comes twice would count twice.
            raise self.refuse(place, "more than 1 is supported where only listed names may come")

    def number(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(place, "must be a number")
        if keyword == "multipleOf" and value <= 0:
            raise self.refuse(place, "must be greater than 0")
        if keyword.startswith("exclusive") and not self.exclusive and node.get("type") != "integer":
            # The engine lets -1 pass in the range from -1.5 to -1, exclusive.
            del node[keyword]
            _restrict(node, _inclusive(keyword, value))

    def names(self, node: Node, keyword: str, place: str) -> None:
        value = node[keyword]
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refuse(place, "must be an array of strings")

    def values(self, node: Node, keyword: str, place: str) -> None:
        if not isinstance(node[keyword], list) or not node[keyword]:
            raise self.refuse(place, "must be a non-empty array")
        self.any_value(node, keyword, place)

    def any_value(self, node: Node, keyword: str, place: str) -> None:
        """Everything is allowed here."""
        for text in _texts(node[keyword]):
            self.written(text, place)

    def off(self, node: Node, keyword: str, place: str) -> None:
        """Keywords that cannot be enforced, but whose `false` asks for nothing."""
        if node[keyword] is not False:
            raise self.refuse(place, f"the keyword {keyword!r} is not supported")
        del node[keyword]

    def identity(self, node: Node, keyword: str, place: str) -> None:
        if node is not self.root:
            raise self.refuse(place, f"{keyword} is supported at the root only")
        value = str(node[keyword])
        known = "//json-schema.org/" in value and any(name in value for name in _DRAFTS)
        if keyword == "$schema" and not known:
            raise self.refuse(place, f"the dialect {value!r} is not known")
        del node[keyword]

    def reference(self, node: Node, keyword: str, place: str) -> None:
        siblings = node.keys() - _ANNOTATIONS - {keyword}
        if self.old_draft and siblings:
            raise self.refuse(
                place, f"draft 7 and older ignore what stands next to $ref: {min(siblings)}"
            )
        target = self.resolve(node[keyword], place)
        self.walk(target, self.at + unquote(node[keyword][1:]))

    def resolve(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self.refuse(place, "only '#' and '#/...' (within the same schema) are supported")
        node: Any = self.root
        for part in unquote(reference[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise self.refuse(place, f"{reference!r} leads nowhere")
        return node

    def follow(self, node: Any) -> Any:
        """The schema behind a chain of references."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or set(node) - _ANNOTATIONS != {"$ref"}:
                break
            node = self.resolve(node["$ref"], "")
        return node


def _restrict(node: Node, more: Node) -> None:
    """Add a restriction to what the node already says."""
    if node.keys() & more.keys():
        node["allOf"] = [*node.get("allOf", []), more]
    else:
        node.update(more)


def _inclusive(keyword: str, value: float) -> Node:
    """An exclusive bound as an inclusive one that the engine can tell from it."""
    margin = max(abs(value) * 1e-12, 1e-15)
    low = keyword == "exclusiveMinimum"
    return {"minimum": value + margin} if low else {"maximum": value - margin}


def _certain(node: Node) -> float:
    """How many properties of different names an object is sure to have, if it has so many."""
    if node.get("additionalProperties") is False and not node.get("patternProperties"):
        return math.inf
    required = node.get("required")
    return len({str(name) for name in required}) if isinstance(required, list) else 0


Handler = Callable[[_Rewriter, Node, str, str], None]

_HANDLERS: dict[str, Handler] = {
    "type": _Rewriter.kind,
    "enum": _Rewriter.values,
    "const": _Rewriter.any_value,
    "minimum": _Rewriter.number,
    "maximum": _Rewriter.number,
    "exclusiveMinimum": _Rewriter.number,
    "exclusiveMaximum": _Rewriter.number,
    "multipleOf": _Rewriter.number,
    "minLength": _Rewriter.count,
    "maxLength": _Rewriter.count,
    "minItems": _Rewriter.count,
    "maxItems": _Rewriter.count,
    "minProperties": _Rewriter.count,
    "maxProperties": _Rewriter.count,
    "pattern": _Rewriter.pattern,
    "format": _Rewriter.format,
    "items": _Rewriter.items,
    "additionalItems": _Rewriter.additional_items,
    "prefixItems": _Rewriter.schemas,
    "properties": _Rewriter.properties,
    "patternProperties": _Rewriter.pattern_properties,
    "additionalProperties": _Rewriter.schema,
    "required": _Rewriter.names,
    "anyOf": _Rewriter.schemas,
    "allOf": _Rewriter.schemas,
    "oneOf": _Rewriter.one_of,
    "$ref": _Rewriter.reference,
    "$id": _Rewriter.identity,
    "$schema": _Rewriter.identity,
    "uniqueItems": _Rewriter.off,
    "nullable": _Rewriter.off,
}
