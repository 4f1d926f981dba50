"""What tells the values of one JSON schema from those of another: for `oneOf`. Pure."""

from typing import Any

TYPES = frozenset(["null", "boolean", "integer", "number", "string", "array", "object"])


class Traits:
    """What tells a schema's values from those of another: their types, constant properties."""

    def __init__(self, node: Any) -> None:
        self.types: set[str] = set(TYPES)
        self.constants: dict[str, set[str]] = {}
        if not isinstance(node, dict):
            return
        given = node.get("type")
        named = [given] if isinstance(given, str) else given
        self.types = _constant_types(node) or set(named or TYPES)
        if "number" in self.types:
            self.types.add("integer")
        if self.types == {"object"} and isinstance(node.get("properties"), dict):
            required = node.get("required", [])
            for name in required if isinstance(required, list) else []:
                values = _constants(node["properties"].get(name))
                if values:
                    self.constants[name] = values

    def excludes(self, other: "Traits") -> bool:
        """True when no value can fit both."""
        if not self.types & other.types:
            return True
        if self.types != {"object"} or other.types != {"object"}:
            return False
        return any(
            not values & other.constants[name]
            for name, values in self.constants.items()
            if name in other.constants
        )


def _constants(node: Any) -> set[str]:
    """The strings that a schema allows, if it lists nothing else."""
    if not isinstance(node, dict):
        return set()
    values = [node["const"]] if "const" in node else node.get("enum") or []
    return set(values) if all(isinstance(value, str) for value in values) else set()


def _constant_types(node: dict[str, Any]) -> set[str]:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    values = [node["const"]] if "const" in node else node.get("enum") or []
    return {names.get(type(value), "number") for value in values}
