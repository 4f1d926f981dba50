"""The tools of a request: their names, and the types that their schemas give to arguments.

Dialects that write arguments as plain text need the types to make JSON of it. Never raises for
what a model wrote; what does not fit its type is a string.
"""

from typing import Any

from headrace.text.parsers.json_text import dumps, loads

_JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_CONSTANTS = {"true": "true", "false": "false", "none": "null", "null": "null"}


class Tools:
    """Names and argument types of the tools of one request (OpenAI's or bare function objects)."""

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        functions = [tool.get("function") or tool for tool in tools]
        self._parameters: dict[str, dict[str, Any]] = {
            function["name"]: _object(function.get("parameters")) for function in functions
        }

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def types(self, tool: str, argument: str) -> set[str]:
        """JSON types that the argument may have; empty if nothing is said."""
        root = self._parameters.get(tool, {})
        properties = _object(root.get("properties"))
        if argument in properties:
            schema = properties[argument]
        else:
            schema = root.get("additionalProperties")
        return _types(_object(schema), root)


def to_json(text: str, types: set[str]) -> str:
    """JSON for an argument written as plain text."""
    if types == {"string"}:
        return dumps(text)
    plain = text.strip()
    plain = _CONSTANTS.get(plain.lower(), plain) if "string" not in types else plain
    try:
        value = loads(plain)
        found = dumps(value)
    except ValueError:
        return dumps(text)
    kind = _JSON_TYPES[type(value)]
    if kind == "number" and types == {"integer"} and value.is_integer():
        return str(int(value))
    fits = not types or kind in types or (kind == "integer" and "number" in types)
    return (plain if not isinstance(value, str) else found) if fits else dumps(text)


def _types(schema: dict[str, Any], root: dict[str, Any]) -> set[str]:
    """Types of a schema and its branches; each schema is looked at once, so cycles end."""
    found: set[str] = set()
    todo, seen = [schema], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kinds = one.get("type")
        if isinstance(kinds, str | list):
            named = [kinds] if isinstance(kinds, str) else kinds
            found.update(kind for kind in named if isinstance(kind, str))
            continue
        values = [one["const"]] if "const" in one else one.get("enum")
        if isinstance(values, list):
            found.update(_JSON_TYPES.get(type(value), "string") for value in values)
        if isinstance(reference := one.get("$ref"), str):
            todo.append(_resolve(reference, root))
        for keyword in ("anyOf", "oneOf", "allOf"):
            branches = one.get(keyword)
            todo += [_object(branch) for branch in branches] if isinstance(branches, list) else []
    return found


def _resolve(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    """The target of a local reference such as #/$defs/Point."""
    found: Any = root
    for key in reference.removeprefix("#/").split("/"):
        found = _object(found).get(key)
    return _object(found)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
